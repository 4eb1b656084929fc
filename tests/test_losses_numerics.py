"""Gradients are those of the definition, and hold in every dtype and at the edges of its range."""

import math

import pytest
import torch
from losses_table import (
    Slack,
    both_losses,
    check,
    every_dtype,
    every_mode,
    logits,
    normal,
    on_every_engine,
    on_every_isa,
)
from torch.autograd import gradcheck, gradgradcheck

from kdcore.losses import dkd_loss, kd_loss
from kdcore.losses.normalise import class_statistics
from kdcore.losses.reference import kl_rows


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


@on_every_engine
@both_losses
@every_dtype
@every_mode
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", EXTREMES)
def test_logits_of_ten_thousand_give_the_float64_loss_and_gradient(backend, loss, dtype, mode, temperature, kind):
    student, teacher = (z.to(dtype) for z in EXTREMES[kind]())
    target = torch.arange(6) % 2
    settings = {"normalize": mode, "temperature": temperature, "ce_weight": 0.5, "backend": backend}
    # of "both up" under "instance", less than 1e-9 is left
    slack = Slack(grad=1e-18 if dtype == torch.float64 else 1e-9)
    check(loss, student, teacher, target, slack=slack, where=kind, **settings)


@on_every_engine
@both_losses
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saturated_rows_among_usual_ones_give_the_float64_loss_and_gradient(backend, loss, dtype, mode):
    student, teacher, target = logits(40, 101)
    student[3] = 1e4 * student[3].sign()
    teacher[9] = 1e4 * teacher[9].sign()
    student[17, 5], teacher[17, 5] = 1e4, -1e4
    student[39], teacher[39] = 30 * student[39].sign(), -30 * student[39].sign()
    settings = {"normalize": mode, "ce_weight": 0.5, "backend": backend}
    check(loss, student.to(dtype), teacher.to(dtype), target, **settings)


# the compiled op's gradient


def logit_settings(mode, smoothing=0.0):
    return {"normalize": mode, "ce_weight": 0.3, "label_smoothing": smoothing, "temperature": 2.5, "kd_weight": 1.7}


@on_every_isa
@both_losses
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_compiled_gradient_is_that_of_the_compiled_loss(loss, mode, reduction, smoothing, ignored):
    student, teacher, target = sample(6, 5)
    if ignored:
        target[2] = -100
    settings = {**logit_settings(mode, smoothing), "reduction": reduction, "backend": "cpu"}
    assert gradcheck(lambda s: loss(s, teacher, target, **settings), [student.requires_grad_()])


@on_every_isa
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [2, 9, 17])
def test_the_compiled_gradient_without_labels_or_with_soft_ones_is_that_of_the_loss(mode, reduction, classes):
    student, teacher, _ = sample(5, classes)
    soft, student = teacher.softmax(1), student.requires_grad_()
    settings = {**logit_settings(mode), "reduction": reduction, "backend": "cpu"}
    assert gradcheck(lambda s: kd_loss(s, teacher, **{**settings, "ce_weight": 0.0}), [student])
    for target in (soft, "teacher"):
        assert gradcheck(lambda s, y=target: dkd_loss(s, teacher, y, **settings), [student])


@on_every_isa
@both_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_compiled_gradient_with_given_statistics_or_a_beta_per_row_is_that_of_the_loss(loss, reduction):
    student, teacher, target = sample()
    stats = tuple(part for z in (student, teacher) for part in class_statistics(z))
    settings = {**logit_settings("class"), "reduction": reduction, "backend": "cpu", "stats": stats}
    settings |= {"beta": 1 + normal(5, seed=2).abs()} if loss is dkd_loss else {}
    assert gradcheck(lambda s: loss(s, teacher, target, **settings), [student.requires_grad_()])


def test_kl_of_an_empty_class_is_zero_log_zero():
    log_p, log_q = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, -math.inf]])
    assert kl_rows(log_p, log_q).item() == 0
