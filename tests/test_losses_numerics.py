"""Gradients are those of the definition, and hold in every dtype and at the edges of its range."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kdcore.losses import dkd_loss, kd_loss
from kdcore.losses.reference import kl_rows

MODES = ("none", "class", "instance")
# relative to the largest element: the loss is accumulated in float32, the gradient rounded to the logits' dtype
LOSS_RTOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
GRAD_RTOL = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRAD_ATOL = {torch.float64: 1e-15, torch.float32: 1e-9, torch.float16: 6e-8, torch.bfloat16: 1e-9}
every_dtype = pytest.mark.parametrize("dtype", LOSS_RTOL, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES)
both_losses = pytest.mark.parametrize("loss", [kd_loss, dkd_loss])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(b=5, c=4):
    return normal(b, c), 2 * normal(b, c, seed=1), torch.arange(b) % c


@both_losses
@every_mode
@pytest.mark.parametrize("ignored", [False, True])
def test_gradients_and_second_derivatives_are_those_of_the_loss(loss, mode, ignored):
    student, teacher, target = sample()
    if ignored:
        target[2] = -100
    temperature = torch.tensor(3.0, dtype=torch.float64)

    def function(s, t, temperature):
        settings = {"normalize": mode, "ce_weight": 0.3, "label_smoothing": 0.1, "teacher_grad": True}
        return loss(s, t, target, temperature=temperature, **settings)

    inputs = [x.requires_grad_() for x in (student, teacher, temperature)]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("stats", ["detached", "given"])
def test_gradients_with_detached_and_given_statistics_are_those_of_the_loss(stats):
    student, teacher, target = sample()
    mean, var = student.mean(0), student.var(0, correction=0)
    t_stats = (teacher.mean(0), teacher.var(0, correction=0))

    def fixed(s):
        return dkd_loss(s, teacher, target, normalize="class", stats=(mean, var, *t_stats))

    student.requires_grad_()
    if stats == "given":
        assert gradcheck(fixed, [student])
        return
    # detached statistics are the same numbers held still
    (expected,) = torch.autograd.grad(fixed(student), student)
    (grad,) = torch.autograd.grad(dkd_loss(student, teacher, target, normalize="class", stats="detached"), student)
    torch.testing.assert_close(grad, expected)


def test_gradients_for_weights_given_as_tensors_are_those_of_the_loss():
    student, teacher, target = sample()
    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.7, 0.2, 1.3)]
    beta = (1 + normal(5, seed=2).abs()).requires_grad_()

    def function(kd_weight, ce_weight, alpha, beta):
        return dkd_loss(student, teacher, target, alpha=alpha, beta=beta, kd_weight=kd_weight, ce_weight=ce_weight)

    assert gradcheck(function, [*weights, beta])


EXTREMES = {
    "spread": lambda: (1e4 * normal(6, 5).clamp(-1, 1), 1e4 * normal(6, 5, seed=1).clamp(-1, 1)),
    "offset": lambda: (9e3 + 500 * normal(6, 5), 9e3 + 500 * normal(6, 5, seed=1)),
    "signs": lambda: (1e4 * SIGNS, -1e4 * SIGNS.roll(1, 1)),
    "equal": lambda: (1e4 * SIGNS, 1e4 * SIGNS),
    "target up": lambda: (normal(6, 5) + 1e4 * HOT, normal(6, 5, seed=1) - 1e4 * HOT),
    "target down": lambda: (normal(6, 5) - 1e4 * HOT, normal(6, 5, seed=1) + 1e4 * HOT),
    "both up": lambda: (normal(6, 5) + 1e4 * HOT, normal(6, 5, seed=1) + 1e4 * HOT),
    "both down": lambda: (normal(6, 5) - 1e4 * HOT, normal(6, 5, seed=1) - 1e4 * HOT),
    "two classes": lambda: (1e4 * normal(6, 2).sign() * PAIR, 1e4 * normal(6, 2, seed=1).sign() * PAIR),
    "usual": lambda: (normal(6, 5), 3 * normal(6, 5, seed=1)),
}
HOT = torch.eye(5, dtype=torch.float64)[torch.arange(6) % 2]
SIGNS = torch.where(torch.arange(30).view(6, 5) % 3 == 0, 1.0, -1.0).double()
PAIR = torch.tensor([1.0, 0.5], dtype=torch.float64)


def run(loss, student, teacher, target, **settings):
    student = student.clone().requires_grad_()
    value, parts = loss(student, teacher, target, return_parts=True, **settings)
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad, parts


@both_losses
@every_dtype
@every_mode
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", EXTREMES)
def test_logits_of_ten_thousand_give_the_float64_loss_and_gradient(loss, dtype, mode, temperature, kind):
    student, teacher = (z.to(dtype) for z in EXTREMES[kind]())
    target = torch.arange(6) % 2
    settings = {"normalize": mode, "temperature": temperature, "ce_weight": 0.5}
    value, grad, parts = run(loss, student, teacher, target, **settings)
    assert grad.dtype == dtype
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(part.dtype == value.dtype for part in parts.values())
    assert value.isfinite()
    assert grad.isfinite().all()
    exact, exact_grad, exact_parts = run(loss, student.double(), teacher.double(), target, **settings)
    close = {"rel": LOSS_RTOL[dtype], "abs": 1e-6 * temperature**2}  # a small divergence is a difference of large terms
    assert value.item() == pytest.approx(exact.item(), **close)
    for name, part in parts.items():
        assert part.item() == pytest.approx(exact_parts[name].item(), **close)
    bar = GRAD_RTOL[dtype] * exact_grad.abs().max().item() + GRAD_ATOL[dtype]
    assert (grad.double() - exact_grad).abs().max().item() <= bar


@every_dtype
@every_mode
def test_with_two_classes_nckd_and_its_gradient_are_exactly_zero(dtype, mode):
    student, teacher = (1e2 * normal(6, 2, seed=seed).to(dtype) for seed in (0, 1))
    student.requires_grad_()
    loss = dkd_loss(student, teacher, torch.arange(6) % 2, alpha=0.0, beta=8.0, normalize=mode)
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


@both_losses
@every_mode
def test_half_logits_accumulate_and_report_in_float32(loss, mode):
    # a float16 sum of 4,000 logits near 8 would stop growing at 16,384, and so would one of losses
    student = (normal(4000, 3) + 8).half()
    teacher = (normal(4000, 3, seed=1) + 8).half()
    target = torch.arange(4000) % 3
    value = loss(student, teacher, target, normalize=mode, reduction="sum")
    exact = loss(student.double(), teacher.double(), target, normalize=mode, reduction="sum")
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4, 0.1])
def test_a_constant_class_or_row_normalises_to_exactly_zero(offset):
    student = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    student[:, 1] = offset
    zero = student.clone()
    zero[:, 1] = 0.0
    assert kd_loss(student, teacher, normalize="class") == kd_loss(zero, teacher, normalize="class")
    flat, other = torch.full((1, 4), offset, requires_grad=True), teacher[:1]
    loss = kd_loss(flat, other, normalize="instance")
    assert loss == kd_loss(torch.zeros(1, 4), other, normalize="instance")
    loss.backward()
    assert flat.grad.isfinite().all()


@both_losses
def test_a_class_masked_on_both_sides_is_as_if_it_were_not_there(loss):
    student, teacher, _ = sample()
    target = torch.tensor([0, 1, 2, 0, 1])
    gone = torch.tensor([False, False, False, True])
    settings = {"ce_weight": 0.5, "temperature": torch.tensor(2.0, requires_grad=True)}
    masked, grad, parts = run(
        loss, student.masked_fill(gone, -math.inf), teacher.masked_fill(gone, -math.inf), target, **settings
    )
    without, small, small_parts = run(loss, student[:, :3], teacher[:, :3], target, **settings)
    torch.testing.assert_close(masked, without)
    torch.testing.assert_close(grad[:, :3], small)
    torch.testing.assert_close(parts, small_parts)
    assert (grad[:, 3] == 0).all()


@both_losses
def test_a_masked_class_leaves_a_learned_temperature_and_the_teacher_finite_gradients(loss):
    student, teacher, target = sample()
    student[:, 3] = teacher[:, 3] = -math.inf
    target = target % 3
    temperature = torch.tensor(2.0, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (student, teacher, temperature)]
    value = loss(student, teacher, target, temperature=temperature, teacher_grad=True)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, inputs))


def test_dkd_is_finite_where_the_target_or_all_but_the_target_is_masked():
    student, teacher, _ = sample(2, 3)
    for gone, target in (([False, True, False], 1), ([True, False, True], 1)):
        s, t = (z.masked_fill(torch.tensor(gone), -math.inf) for z in (student, teacher))
        value, grad, _ = run(dkd_loss, s, t, torch.tensor([target, target]))
        assert value.isfinite()
        assert grad.isfinite().all()


def test_a_class_that_only_the_student_lacks_is_an_infinite_divergence():
    student, teacher, target = sample()
    student[0, 3] = -math.inf
    assert kd_loss(student, teacher) == math.inf
    assert dkd_loss(student, teacher, target) == math.inf


def test_a_class_that_only_the_teacher_lacks_is_finite():
    student, teacher, target = sample()
    teacher[:, 3] = -math.inf
    for loss in (kd_loss, dkd_loss):
        value, grad, _ = run(loss, student, teacher, target)
        assert value.isfinite()
        assert grad.isfinite().all()


def test_kl_of_an_empty_class_is_zero_log_zero():
    log_p, log_q = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, -math.inf]])
    assert kl_rows(log_p, log_q).item() == 0
