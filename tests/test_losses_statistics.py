"""Whose gradient flows where, and which statistics a class is normalised by."""

import pytest
import torch
from losses_table import both_losses, check, every_dtype, every_mode, logits, on_every_engine, run

from kdcore.losses import kd_loss
from kdcore.losses.normalise import class_statistics

every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture
def pair():
    student, teacher, _ = logits(6, 4)
    return student.requires_grad_(), 2 * teacher, torch.tensor([0, 1, 2, 3, 0, 1])


def gradient(loss, student):
    return torch.autograd.grad(loss.sum(), student)[0]


@on_every_engine
@both_losses
@every_mode
@every_reduction
def test_the_teacher_gets_no_gradient_unless_asked(pair, backend, loss, mode, reduction):
    student, teacher, target = pair
    teacher.requires_grad_()
    value = loss(student, teacher, target, normalize=mode, reduction=reduction, backend=backend).sum()
    assert torch.autograd.grad(value, teacher, allow_unused=True, retain_graph=True) == (None,)
    kept = loss(student, teacher, target, normalize=mode, reduction=reduction, teacher_grad=True).sum()
    torch.testing.assert_close(kept, value)
    assert gradient(kept, teacher).abs().max() > 0


def test_given_statistics_of_the_teacher_are_detached_with_it(pair):
    student, teacher, _ = pair
    teacher.requires_grad_()
    stats = (*class_statistics(student.detach()), *class_statistics(teacher))
    value = kd_loss(student, teacher, normalize="class", stats=stats)
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)


@on_every_engine
@both_losses
@every_reduction
def test_detached_statistics_give_the_same_loss_and_another_gradient(pair, backend, loss, reduction):
    student, teacher, target = pair
    settings = {"normalize": "class", "reduction": reduction, "backend": backend}
    batch = loss(student, teacher, target, **settings)
    detached = loss(student, teacher, target, stats="detached", **settings)
    torch.testing.assert_close(batch, detached, rtol=1e-14, atol=0)
    assert not torch.allclose(gradient(batch, student), gradient(detached, student))


@on_every_engine
@every_dtype
@both_losses
@every_reduction
@pytest.mark.parametrize("stats", ["batch", "detached", "given"])
def test_every_kind_of_statistics_agrees_with_float64(backend, dtype, loss, reduction, stats):
    student, teacher, target = logits(45, 37, dtype)
    if stats == "given":
        stats = tuple(0.9 * part + 0.1 for z in (student, teacher) for part in class_statistics(z))
    settings = {"normalize": "class", "stats": stats, "reduction": reduction, "ce_weight": 0.5}
    check(loss, student, teacher, target, backend=backend, **settings)


@on_every_engine
@both_losses
@every_dtype
def test_given_statistics_allow_a_batch_of_one(backend, loss, dtype):
    student, teacher, target = logits(8, 21, dtype)
    stats = tuple(part for z in (student, teacher) for part in class_statistics(z))
    whole = loss(student, teacher, target, normalize="class", stats=stats, reduction="none", backend=backend)
    for i in (0, 7):
        one = [x[i : i + 1] for x in (student, teacher, target)]
        alone = loss(*one, normalize="class", stats=stats, reduction="none", backend=backend)
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-6, atol=1e-6)
        check(loss, *one, normalize="class", stats=stats, backend=backend)


@on_every_engine
def test_class_statistics_are_biased_and_instance_deviation_is_not(pair, backend):
    student, teacher, _ = pair
    h_class = [(z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (student, teacher)]
    h_row = [(z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (student, teacher)]
    for mode, h in (("class", h_class), ("instance", h_row)):
        found = kd_loss(student, teacher, normalize=mode, backend=backend)
        torch.testing.assert_close(found, kd_loss(*h, backend=backend))


@on_every_engine
@both_losses
@every_mode
def test_one_row_is_what_it_is_in_a_batch_and_has_no_class_statistics(pair, backend, loss, mode):
    student, teacher, target = pair
    one = (student[2:3], teacher[2:3], target[2:3])
    if mode == "class":
        for stats in ("batch", "detached"):
            with pytest.raises(ValueError, match=r'normalize="class" needs .* at least 2 rows'):
                loss(*one, normalize="class", stats=stats, backend=backend)
        return
    whole = loss(student, teacher, target, normalize=mode, reduction="none", backend=backend)
    torch.testing.assert_close(loss(*one, normalize=mode, backend=backend), whole[2])
    _, grad, _ = run(loss, *one, normalize=mode, backend=backend)
    torch.testing.assert_close(grad, gradient(whole, student)[2:3])
