"""Where kernels go wrong: constant, shifted, masked and saturated logits, sums too large for a dtype, and strides."""

import math

import pytest
import torch
from losses_table import (
    Slack,
    both_losses,
    check,
    every_dtype,
    every_mode,
    exact,
    logits,
    normal,
    on_every_engine,
    run,
)

from kdcore.losses import dkd_loss

every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


# two classes, constants, offsets


@on_every_engine
@every_dtype
@every_mode
@pytest.mark.parametrize("rows", [2, 6, 37])
def test_with_two_classes_nckd_and_its_gradient_are_exactly_zero(backend, dtype, mode, rows):
    student, teacher = (1e2 * normal(rows, 2, seed=seed).to(dtype) for seed in (0, 1))
    for beta in (8.0, torch.full((rows,), 8.0)):
        settings = {"alpha": 0.0, "beta": beta, "normalize": mode, "backend": backend}
        value, grad, parts = run(dkd_loss, student, teacher, torch.arange(rows) % 2, **settings)
        assert value == 0
        assert parts["nckd"] == 0
        assert (grad == 0).all()


@on_every_engine
@every_dtype
@pytest.mark.parametrize("offset", [0.0, 1e4, 0.1])
@pytest.mark.parametrize("rows", [2, 7, 100, 257, 512, 1000])
@every_reduction
def test_a_constant_class_normalises_to_exactly_zero(backend, dtype, offset, rows, reduction):
    student, teacher, target = logits(rows, 21, dtype)
    for side in (student, teacher):
        side[:, 4] = offset
    settings = {"normalize": "class", "reduction": reduction, "backend": backend}
    value, grad, _ = run(dkd_loss, student, teacher, target, **settings)
    for side in (student, teacher):
        side[:, 4] = 0
    plain, plain_grad, _ = run(dkd_loss, student, teacher, target, **settings)
    assert torch.equal(value, plain)
    assert torch.equal(grad, plain_grad)


@on_every_engine
@every_dtype
@pytest.mark.parametrize("offset", [0.0, 1e4, 0.1])
@pytest.mark.parametrize("classes", [2, 7, 100, 1000])
def test_a_constant_row_normalises_to_exactly_zero(backend, dtype, offset, classes):
    student, teacher, target = logits(9, classes, dtype)
    teacher[6] = 0
    flat, zero = student.clone(), student.clone()
    flat[3], zero[3], flat[8], zero[8] = offset, 0, -offset, 0
    settings = {"normalize": "instance", "reduction": "none", "backend": backend}
    value, grad, _ = run(dkd_loss, flat, teacher, target, **settings)
    plain, plain_grad, _ = run(dkd_loss, zero, teacher, target, **settings)
    assert torch.equal(value, plain)
    assert not grad.isnan().any()  # of the order 1e7 T / B, which is more than float16 has
    assert torch.equal(grad, plain_grad)


@on_every_engine
@both_losses
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e3])
@pytest.mark.parametrize("shape", [(7, 21), (64, 100), (512, 37), (6, 8200)], ids=str)
@every_reduction
def test_a_large_offset_of_a_class_costs_no_accuracy(backend, loss, offset, shape, reduction):
    # the mean in float32 is 5e-4 off there, and what is subtracted from it is as far off unless it is shifted first
    student, teacher, target = logits(*shape, torch.float32)
    shift = offset * normal(shape[1], seed=9).sign().float()
    settings = {"normalize": "class", "reduction": reduction, "backend": backend}
    # one row alone is worth more rounding than a mean, in plain torch
    slack = Slack(factor=4 if backend == "reference" else 1)
    check(loss, student + shift, teacher - shift, target, slack=slack, **settings)


@on_every_engine
@both_losses
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_offset_of_a_row_costs_no_accuracy(backend, loss, offset):
    student, teacher, target = logits(33, 100, torch.float32)
    for mode in ("none", "instance"):
        check(loss, student + offset, teacher - offset, target, normalize=mode, ce_weight=0.5, backend=backend)


@on_every_engine
@both_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_sorted_by_class_costs_no_accuracy(backend, loss, dtype):
    # the first rows tell nothing of the others: a label's logit is 15 above the rest
    student, teacher, target = logits(2000, 37)
    target = target.sort().values
    for side in (student, teacher):
        side[torch.arange(2000), target] += 15
    check(loss, student.to(dtype), teacher.to(dtype), target, normalize="class", backend=backend)


@on_every_engine
@both_losses
def test_a_few_rows_unlike_all_others_cost_little_accuracy_wherever_they_are(backend, loss):
    student, teacher, target = logits(5000, 21, torch.float32)
    for start in (0, 2496, 4992):
        s, t = student.clone(), teacher.clone()
        s[start : start + 8] += 30
        t[start : start + 8] -= 30
        truth = exact(loss, s, t, target, normalize="class")
        # sums of squares around the first rows lose what lies between those and the others
        slack = Slack(grad=2e-4 * truth.grad.abs().max().item() if backend == "cpu" and start == 0 else 0)
        check(loss, s, t, target, truth=truth, slack=slack, normalize="class", backend=backend)


@on_every_engine
@both_losses
@pytest.mark.parametrize("shape", [(9, 37), (5, 1000), (3, 8200)], ids=str)
def test_a_first_class_far_from_all_others_costs_no_accuracy(backend, loss, shape):
    student, teacher, target = logits(*shape, torch.float32)
    student[:, 0] += 1e3
    teacher[:, 0] -= 1e3
    check(loss, student, teacher, target, normalize="instance", ce_weight=0.5, backend=backend)


# sums that a dtype or an exponential cannot hold


@on_every_engine
@both_losses
@every_mode
def test_half_logits_accumulate_and_report_in_float32(backend, loss, mode):
    # a float16 sum of 4,000 logits near 8 would stop growing at 16,384, and so would one of losses
    student = (normal(4000, 3) + 8).half()
    teacher = (normal(4000, 3, seed=1) + 8).half()
    check(loss, student, teacher, torch.arange(4000) % 3, normalize=mode, reduction="sum", backend=backend)


@on_every_engine
@every_mode
@both_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits_near_the_largest_number_of_float16_stay_exact(backend, mode, loss, dtype):
    student, teacher, target = logits(12, 37)
    for side in (student, teacher):
        side *= 65504 / side.abs().max()
    assert student.half().isfinite().all()
    check(loss, student.to(dtype), teacher.to(dtype), target, normalize=mode, ce_weight=0.5, backend=backend)


@on_every_engine
@both_losses
@every_mode
@pytest.mark.parametrize(
    ("rows", "temperature"), [(1601, 1.0), (1602, 1.0), (3700, 1.0), (5000, 0.5), (5000, 1.5), (800, 0.1)], ids=str
)
def test_scores_that_overflow_an_exponential_are_shifted_first(backend, loss, mode, rows, temperature):
    # Samuelson: a normalised number is at most sqrt(n - 1), and a column (row) of zeros with a single one attains it
    shape = (5, rows) if mode == "instance" else (rows, 5)
    student, teacher, target = logits(*shape, torch.float32)
    for side, place in ((student, 1), (teacher, 2)):
        side[0], side[:, 0] = 0, 0
        side[0, 0], side[place, 0], side[0, place] = 0, 1, 1
    settings = {"normalize": mode, "temperature": temperature, "backend": backend}
    for reduction in ("mean", "none"):
        check(loss, student, teacher, target, reduction=reduction, **settings)


# masked classes


def masked(*gone, rows=5, classes=4, dtype=torch.float64):
    """Student and teacher whose classes ``gone`` are -inf, each side's own where a pair is given."""
    student, teacher, target = logits(rows, classes, dtype)
    sides = gone if len(gone) == 2 else (*gone, *gone)
    for side, columns in zip((student, teacher), sides, strict=True):
        side[:, columns] = -math.inf
    return student, teacher, target


@on_every_engine
@both_losses
@every_dtype
@every_reduction
def test_a_class_masked_on_both_sides_is_as_if_it_were_not_there(backend, loss, dtype, reduction):
    for classes, gone in ((4, [3]), (21, [0, 7, 8, 20]), (100, list(range(40, 99))), (19, [16, 17, 18])):
        student, teacher, target = masked(gone, classes=classes, rows=9, dtype=dtype)
        stay = [column for column in range(classes) if column not in gone]
        target = torch.tensor(stay)[target % len(stay)]
        settings = {"ce_weight": 0.5, "reduction": reduction}
        without = exact(
            loss,
            student[:, stay],
            teacher[:, stay],
            torch.arange(classes)[target % classes].apply_(stay.index),
            **settings,
        )
        value, grad, parts = run(loss, student, teacher, target, **settings, backend=backend)
        assert (grad[:, gone] == 0).all()
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(value.double(), without.value, **tolerance)
        torch.testing.assert_close({k: part.double() for k, part in parts.items()}, without.parts, **tolerance)
        bar = (2e-5 + torch.finfo(dtype).eps) * without.grad.abs().max() if dtype != torch.float64 else 1e-12
        assert (grad[:, stay].double() - without.grad).abs().max() <= bar


@both_losses
def test_a_masked_class_leaves_a_learned_temperature_and_the_teacher_finite_gradients(loss):
    student, teacher, target = masked([3])
    temperature = torch.tensor(2.0, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (student, teacher, temperature)]
    value = loss(student, teacher, target % 3, temperature=temperature, teacher_grad=True)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, inputs))


@on_every_engine
@every_dtype
@every_reduction
@pytest.mark.parametrize("classes", [3, 21])
def test_dkd_is_finite_where_the_target_or_all_but_the_target_is_masked(backend, dtype, reduction, classes):
    for gone in ([1], [column for column in range(classes) if column != 1]):
        student, teacher, _ = masked(gone, rows=2, classes=classes, dtype=dtype)
        target = torch.tensor([1, 1])
        check(dkd_loss, student, teacher, target, reduction=reduction, backend=backend)
        value, grad, _ = run(dkd_loss, student, teacher, target, reduction=reduction, backend=backend)
        assert value.isfinite().all()
        assert grad.isfinite().all()


@on_every_engine
@both_losses
@every_dtype
def test_a_class_that_only_the_student_lacks_is_an_infinite_divergence(backend, loss, dtype):
    for classes in (4, 21, 64):
        student, teacher, target = logits(6, classes, dtype)
        missing = (target[0] + 1) % classes
        student[0, missing] = -math.inf
        rows = loss(student, teacher, target, reduction="none", backend=backend)
        assert rows[0] == math.inf
        assert rows[1:].isfinite().all()
        assert loss(student, teacher, target, backend=backend) == math.inf
        teacher[0, missing] = -3e4  # its mass is exactly 0 in every dtype
        assert loss(student, teacher, target, reduction="none", backend=backend).isfinite().all()


@on_every_engine
@both_losses
@every_dtype
@every_reduction
def test_a_class_that_only_the_teacher_lacks_is_finite(backend, loss, dtype, reduction):
    for classes, gone in ((4, [3]), (21, [0, 7, 8, 20]), (64, list(range(32)))):
        student, teacher, target = masked([], gone, classes=classes, rows=9, dtype=dtype)
        value, grad, _ = run(loss, student, teacher, target, ce_weight=0.5, reduction=reduction, backend=backend)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        check(loss, student, teacher, target, ce_weight=0.5, reduction=reduction, backend=backend)


# strides


def gapped(z):
    return torch.cat([z, torch.full_like(z[:, :3], math.nan)], dim=1)[:, : z.shape[1]]


def every_second_row(z):
    return torch.stack([z, torch.full_like(z, math.nan)], dim=1).flatten(0, 1)[::2]


def transposed(z):
    return z.t().contiguous().t()


def every_second_class(z):
    return torch.stack([z, torch.full_like(z, math.nan)], dim=2).flatten(1)[:, ::2]


def odd_start(z):
    return torch.cat([z.new_full((1,), math.nan), z.flatten()])[1:].view_as(z)


LAYOUTS = [gapped, every_second_row, transposed, every_second_class, odd_start]


@on_every_engine
@every_dtype
@every_mode
@every_reduction
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_strided_or_unaligned_input_gives_the_bits_of_a_contiguous_one(backend, dtype, mode, reduction, layout):
    settings = {"normalize": mode, "ce_weight": 0.5, "reduction": reduction, "backend": backend}
    for rows, classes in ((7, 21), (33, 100), (3, 8200)):
        student, teacher, target = logits(rows, classes, dtype)
        target[1] = -100
        value, grad, _ = run(dkd_loss, student, teacher, target, **settings)
        for s, t in ((layout(student), teacher), (student, layout(teacher)), (layout(student), layout(teacher))):
            leaf = s.detach().requires_grad_()
            found = dkd_loss(leaf, t, torch.stack([target, target], 1)[:, 0], **settings)
            (found_grad,) = torch.autograd.grad(found.sum(), leaf)
            assert torch.equal(found, value)
            assert torch.equal(found_grad, grad)


@on_every_engine
@both_losses
@every_mode
def test_one_row_expanded_to_a_batch_is_that_row_repeated(backend, loss, mode):
    student, teacher, target = logits(2, 21, torch.float32)
    row = student[:1].clone().requires_grad_()
    settings = {"normalize": mode, "ce_weight": 0.5, "backend": backend}
    for other in (teacher[:1].expand(9, 21), teacher.repeat(5, 1)[:9]):
        value = loss(row.expand(9, 21), other, target[:1].expand(9), **settings)
        expected, grad, _ = run(loss, row.detach().repeat(9, 1), other.contiguous(), target[:1].repeat(9), **settings)
        assert torch.equal(value.detach(), expected)
        torch.testing.assert_close(torch.autograd.grad(value, row)[0], grad.sum(0, keepdim=True))
