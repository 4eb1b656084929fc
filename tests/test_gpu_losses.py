"""The CUDA kernels compute the losses, at every dtype and mode and by all their rules; `make test` leaves these out."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_table import BACKEND, DEVICE, check, needs_op, on_a_gpu, on_device
from losses_table import DTYPES, LOSSES, MODES, check_grad, check_value, exact, logits, normal, run

from kdcore.losses import dkd_loss, kd_loss

pytestmark = [*on_a_gpu, needs_op]

# one row, two classes, less and more than a block of threads and than a chunk of rows, more classes than 8192
SHAPES = [(1, 2), (2, 2), (2, 7), (3, 13), (7, 100), (33, 64), (40, 1271), (70, 129), (300, 10), (1100, 21), (9, 8200)]
# the bounds of csrc/cuda/plan.h: tiles of 256 threads and of 512, with whole words and without; rows of several blocks
EDGES = [(33, 512), (33, 514), (20, 1024), (20, 1026), (12, 2048), (12, 2050), (12, 3001), (20, 4096), (9, 4104)]
EDGES += [(5, 9001), (2, 40000), (2100, 40)]

every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


# the table


@every_dtype
@every_mode
@both_losses
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_loss_gradient_and_parts_agree_with_float64(loss, mode, dtype, ce_weight):
    for rows, classes in (*SHAPES, *EDGES):
        if mode == "class" and rows == 1:
            continue
        inputs = logits(rows, classes, dtype, seed=rows + classes)
        check(loss, *inputs, where=f"{rows}x{classes}", normalize=mode, ce_weight=ce_weight)


@every_dtype
@every_mode
@both_losses
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_and_numbers_agree_with_float64(loss, mode, dtype, reduction):
    weights = {"alpha": 0.5, "beta": 3.0} if loss is dkd_loss else {}
    kinds = {"kd_weight": 0.3, "ce_weight": 2.0, "label_smoothing": 0.1, "eps": 1e-3, "reduction": reduction}
    for temperature in (0.7, 8.0):
        inputs = logits(64, 100, dtype)
        check(loss, *inputs, normalize=mode, temperature=temperature, **kinds, **weights)


@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_normalised_logits_that_need_their_maximum_agree_with_float64(dtype, reduction):
    for rows, classes in [(300, 100), (300, 1271), (400, 4096), (300, 5001)]:
        inputs = logits(rows, classes, dtype)
        kinds = {"normalize": "class", "temperature": 0.3, "ce_weight": 0.5, "reduction": reduction}
        check(dkd_loss, *inputs, where=f"{rows}x{classes}", **kinds)


@every_dtype
@every_mode
@pytest.mark.parametrize("padding", [1, 3, 8, 16])
def test_rows_apart_and_out_of_alignment_are_read_as_they_lie(mode, dtype, padding):
    for rows, classes in [(33, 100), (12, 512), (5, 1030), (5, 4096), (3, 4500)]:
        inputs = logits(rows, classes, dtype)
        truth = exact(dkd_loss, *inputs, normalize=mode, ce_weight=0.5)
        wide = torch.full((2, rows, classes + padding), torch.nan, dtype=dtype, device=DEVICE)
        views = wide[:, :, padding // 2 : padding // 2 + classes]
        for view, z in zip(views, inputs, strict=False):
            view.copy_(z)
        student = views[0].requires_grad_()  # `run` would copy it
        value = dkd_loss(student, views[1], inputs[2].to(DEVICE), normalize=mode, ce_weight=0.5, backend=BACKEND)
        check_value(dtype, value.detach().cpu(), truth.value)
        check_grad(torch.autograd.grad(value, student)[0].cpu(), truth, where=f"{rows}x{classes}")


@every_mode
@pytest.mark.parametrize("rows", range(2, 70, 3))
def test_any_number_of_rows_agrees_with_float64(mode, rows):
    check(dkd_loss, *logits(rows, 21, torch.float32, seed=rows), normalize=mode, ce_weight=0.7)


@pytest.mark.parametrize(("rows", "classes"), [(20000, 100), (3, 128256), (66000, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
def test_many_rows_and_a_vocabulary_agree_with_float64(mode, dtype, rows, classes):
    check(dkd_loss, *logits(rows, classes, dtype), normalize=mode, ce_weight=0.7)


def test_offsets_beyond_32_bits_reach_the_right_rows():
    rows, classes = 70_000, 32_768  # 2^31 elements are row 65,536
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB")
    student = torch.randn(rows, classes, device=DEVICE, dtype=torch.bfloat16)
    teacher = student.roll(1, 0)
    target = torch.arange(rows, device=DEVICE) % classes
    last = slice(rows - 5, rows)
    settings = {"ce_weight": 0.5, "reduction": "sum", "backend": BACKEND}
    ignored = target.clone()
    ignored[: rows - 5] = -100
    value, grad, _ = run(dkd_loss, student, teacher, ignored, **settings)
    alone, alone_grad, _ = run(dkd_loss, student[last], teacher[last], target[last], **settings)
    assert torch.equal(grad[last], alone_grad)
    torch.testing.assert_close(value, alone)
    assert not grad[: rows - 5].any()


# semantics


@both_losses
@every_mode
@pytest.mark.parametrize("junk", [7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_leave_loss_gradient_and_statistics(loss, mode, junk, reduction):
    student, teacher, target = logits(40, 11, torch.float32)
    keep = torch.arange(40) % 3 != 0
    settings = {"normalize": mode, "ce_weight": 0.5, "label_smoothing": 0.1, "reduction": reduction}
    truth = exact(loss, student[keep], teacher[keep], target[keep], **settings)
    for z in (student, teacher):
        z[~keep] = junk
    inputs = on_device(student, teacher, target.where(keep, -100))
    value, grad, parts = run(loss, *inputs, **settings, backend=BACKEND)
    value = value.cpu()
    if reduction == "none":
        assert not value[~keep].any()
        value = value[keep]
    check_value(torch.float32, value, truth.value)
    for name, part in parts.items():
        check_value(torch.float32, part.cpu(), truth.parts[name])
    check_grad(grad.cpu()[keep], truth)
    assert not grad.cpu()[~keep].any()


@both_losses
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_a_row_that_counts_gives_zero(loss, mode, reduction):
    student, teacher, target = logits(6, 5, torch.float32)
    settings = {"normalize": mode, "ce_weight": 1.0, "reduction": reduction, "backend": BACKEND}
    for inputs in ((student, teacher, torch.full_like(target, -100)), (student[:0], teacher[:0], target[:0])):
        value, grad, parts = run(loss, *on_device(*inputs), **settings)
        assert not value.any()
        assert not grad.any()
        assert not any(part.any() for part in parts.values())


@both_losses
@every_mode
@pytest.mark.parametrize("label", [9, -1, 10**12, -(2**63)])
def test_a_label_outside_the_classes_makes_the_loss_nan_and_touches_no_other_row(loss, mode, label):
    student, teacher, target = logits(7, 9, torch.float32)
    target[3] = label
    settings = {"normalize": mode, "ce_weight": 0.5, "backend": BACKEND}
    inputs = on_device(student, teacher, target)
    assert run(loss, *inputs, **settings)[0].isnan()
    rows, grad, _ = run(loss, *inputs, reduction="none", **settings)
    inputs[2][3] = 3
    right, right_grad, _ = run(loss, *inputs, reduction="none", **settings)
    others = torch.arange(7, device=DEVICE) != 3
    assert rows[3].isnan()
    assert torch.equal(rows[others], right[others])
    assert grad[3].isnan().all()
    if mode != "class":  # whose statistics every row shares
        assert torch.equal(grad[others], right_grad[others])
    assert (torch.ones(3, device=DEVICE) + 1).sum().item() == 6  # the device still works


@every_dtype
@both_losses
def test_a_class_masked_on_both_sides_is_as_if_it_were_not_there(loss, dtype):
    student, teacher, target = on_device(*logits(13, 37, dtype))
    target = target % 30
    gone = torch.arange(37, device=DEVICE) >= 30
    masked = [z.masked_fill(gone, -torch.inf) for z in (student, teacher)]
    settings = {"ce_weight": 0.5, "backend": BACKEND}
    value, grad, parts = run(loss, *masked, target, **settings)
    without, small, small_parts = run(loss, student[:, :30], teacher[:, :30], target, **settings)
    torch.testing.assert_close(value, without)
    torch.testing.assert_close(parts, small_parts)
    torch.testing.assert_close(grad[:, :30], small)
    assert not grad[:, 30:].any()


@both_losses
def test_a_class_masked_on_one_side_is_a_finite_or_an_infinite_divergence(loss):
    student, teacher, target = on_device(*logits(13, 37, torch.float32))
    target = target % 30
    gone = torch.arange(37, device=DEVICE) >= 30
    lacks = [z.masked_fill(gone, -torch.inf) for z in (student, teacher)]
    value, grad, _ = run(loss, student, lacks[1], target, backend=BACKEND)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert run(loss, lacks[0], teacher, target, backend=BACKEND)[0] == torch.inf


@pytest.mark.parametrize("student_too", [False, True])
@pytest.mark.parametrize("only", ["the label", "all but the label"])
def test_dkd_agrees_with_float64_where_a_side_has_only_the_label_or_all_but_it(only, student_too):
    student, teacher, target = logits(13, 9, torch.float32)
    label = torch.arange(9) == target[:, None]
    gone = ~label if only == "the label" else label
    teacher = teacher.masked_fill(gone, -torch.inf)
    student = student.masked_fill(gone, -torch.inf) if student_too else student
    check(dkd_loss, student, teacher, target)


@every_dtype
@every_mode
def test_with_two_classes_nckd_and_its_gradient_are_exactly_zero(dtype, mode):
    student, teacher = (1e2 * normal(6, 2, seed=seed).to(dtype) for seed in (0, 1))
    target = torch.arange(6) % 2
    settings = {"alpha": 0.0, "normalize": mode, "backend": BACKEND}
    value, grad, parts = run(dkd_loss, *on_device(student, teacher, target), **settings)
    assert value == 0
    assert parts["nckd"] == 0
    assert not grad.any()


@both_losses
@every_mode
def test_logits_with_any_strides_give_the_same_bits(loss, mode):
    student, teacher, target = on_device(*logits(33, 40, torch.bfloat16))
    settings = {"normalize": mode, "ce_weight": 0.5, "backend": BACKEND}

    def call(*pair):
        value, grad, _ = run(loss, *pair, target, **settings)
        return value, grad.contiguous()

    expected = call(student, teacher)
    wide = [torch.cat([z, z.new_full((33, 7), torch.nan)], 1)[:, :40] for z in (student, teacher)]
    turned = [z.t().contiguous().t() for z in (student, teacher)]
    odd = [torch.cat([z.new_full((33, 1), torch.nan), z], 1)[:, 1:] for z in (student, teacher)]  # aligned to 2 bytes
    for pair in (wide, turned, odd):
        for found, bits in zip(call(*pair), expected, strict=True):
            assert torch.equal(found, bits)
    repeated = teacher[:1].expand(33, 40)
    for found, bits in zip(call(student, repeated), call(student, repeated.contiguous()), strict=True):
        assert torch.equal(found, bits)


@both_losses
def test_targets_of_every_kind_agree_with_float64(loss):
    student, teacher, target = logits(24, 21, torch.float32)
    for kind in (target, torch.softmax(3 * normal(24, 21, seed=5), 1).float(), "teacher"):
        check(loss, student, teacher, kind, ce_weight=0.6)
    check(kd_loss, student, teacher, None, normalize="class")


def test_beta_of_each_row_and_given_and_detached_statistics_agree_with_float64():
    student, teacher, target = logits(24, 21, torch.float32)
    check(dkd_loss, student, teacher, target, beta=8 * normal(24, seed=3).abs().float())
    given = (normal(21).float(), normal(21, seed=1).abs().float() + 0.5, normal(21).float(), torch.full((21,), 4.0))
    for stats, reduction in itertools.product((given, "detached"), ("mean", "none")):
        check(dkd_loss, student, teacher, target, normalize="class", stats=stats, reduction=reduction, ce_weight=0.6)


@both_losses
@pytest.mark.parametrize("offset", [1e3, 1e4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_offset_of_each_class_costs_no_accuracy(loss, offset, reduction):
    student, teacher, target = logits(96, 37, torch.float32)
    shift = offset * normal(37, seed=9).sign().float()
    check(loss, student + shift, teacher - shift, target, normalize="class", reduction=reduction)
