"""What the arguments of the losses mean: the same on every back end and instruction set."""

import pytest
import torch
import torch.nn.functional as F
from losses_table import (
    Slack,
    both_losses,
    check,
    check_grad,
    every_dtype,
    every_mode,
    exact,
    logits,
    on_every_engine,
    run,
)

from kdcore.losses import dkd_loss, kd_loss
from kdcore.losses.functional import cross_entropy

every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture
def pair():
    student, teacher, _ = logits(6, 4)
    return student.requires_grad_(), 2 * teacher, torch.tensor([0, 1, 2, 3, 0, 1])


def gradient(loss, student):
    return torch.autograd.grad(loss.sum(), student)[0]


# labels


@on_every_engine
@both_losses
@every_mode
@pytest.mark.parametrize("junk", [7.0, float("nan"), float("inf")])
def test_ignored_rows_leave_loss_gradient_and_statistics(pair, backend, loss, mode, junk):
    student, teacher, target = pair
    settings = {"normalize": mode, "ce_weight": 0.5, "label_smoothing": 0.1, "backend": backend}
    keep = torch.tensor([True, False, True, True, False, True])
    dirty, unread = student.detach().clone(), teacher.clone()
    dirty[~keep] = unread[~keep] = junk
    dirty.requires_grad_()
    value, parts = loss(dirty, unread, target.where(keep, -100), return_parts=True, **settings)
    alone, alone_parts = loss(student[keep], teacher[keep], target[keep], return_parts=True, **settings)
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(parts, alone_parts)
    grad = gradient(value, dirty)
    torch.testing.assert_close(grad[keep], gradient(alone, student)[keep])
    assert (grad[~keep] == 0).all()
    rows = loss(dirty, unread, target.where(keep, -100), reduction="none", **settings)
    torch.testing.assert_close(rows[keep].mean(), alone)
    assert (rows[~keep] == 0).all()
    torch.testing.assert_close(gradient(rows / keep.sum(), dirty), grad)


@on_every_engine
@every_dtype
@every_mode
@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_any_share_of_ignored_rows_agrees_with_float64(backend, dtype, mode, share):
    student, teacher, target = logits(67, 37, dtype)
    gone = torch.rand(67, generator=torch.Generator().manual_seed(1)) < share
    gone[:2], gone[40] = True, False
    assert 0 < gone.sum() < 67
    settings = {"normalize": mode, "ce_weight": 0.5, "backend": backend}
    check(dkd_loss, student, teacher, target.masked_fill(gone, -100), **settings)


@on_every_engine
@both_losses
@every_mode
@every_reduction
def test_a_batch_without_a_row_that_counts_gives_zero_loss_and_zero_gradient(pair, backend, loss, mode, reduction):
    student, teacher, target = pair
    settings = {"normalize": mode, "ce_weight": 1.0, "reduction": reduction, "return_parts": True, "backend": backend}
    for s, t, y in ((student, teacher, torch.full_like(target, -100)), (student[:0], teacher[:0], target[:0])):
        value, parts = loss(s, t, y, **settings)
        assert value.shape == ((len(s),) if reduction == "none" else ())
        assert (value == 0).all()
        assert all(part == 0 for part in parts.values())
        assert (gradient(value, student) == 0).all()


@on_every_engine
@both_losses
@every_mode
def test_one_row_that_counts_has_no_class_signal_and_else_its_own(pair, backend, loss, mode):
    student, teacher, target = pair
    only = torch.arange(6) == 3
    value = loss(student, teacher, target.where(only, -100), normalize=mode, backend=backend)
    if mode == "class":  # both sides normalise to 0: the host cannot know how many rows count without waiting for them
        assert value == 0
        assert (gradient(value, student) == 0).all()
    else:
        torch.testing.assert_close(value, loss(student[3:4], teacher[3:4], target[3:4], normalize=mode))


@on_every_engine
def test_another_ignore_index_is_a_class_label_no_more(pair, backend):
    student, teacher, target = pair
    rows = kd_loss(student, teacher, target, ignore_index=1, reduction="none", backend=backend)
    assert ((rows == 0) == (target == 1)).all()


@on_every_engine
@both_losses
@pytest.mark.parametrize("label", [4, -1, 10**9, -(2**63), 2**63 - 1])
@every_reduction
def test_a_label_outside_the_classes_is_an_index_error(pair, backend, loss, label, reduction):
    student, teacher, target = pair
    target[3] = label
    with pytest.raises(IndexError, match=f"target holds {label}, outside the 4 classes"):
        loss(student, teacher, target, reduction=reduction, backend=backend)
    loss(student, teacher, target, ignore_index=label, reduction=reduction, backend=backend)


@on_every_engine
@both_losses
@every_reduction
def test_soft_labels_of_one_class_are_hard_labels(pair, backend, loss, reduction):
    student, teacher, target = pair
    settings = {"ce_weight": 0.5, "label_smoothing": 0.2, "reduction": reduction, "backend": backend}
    hard = loss(student, teacher, target, **settings)
    soft = loss(student, teacher, F.one_hot(target, 4).double(), **settings)
    torch.testing.assert_close(soft, hard)
    torch.testing.assert_close(gradient(soft, student), gradient(hard, student))


@on_every_engine
@every_dtype
@every_mode
@both_losses
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_soft_labels_take_their_argmax_for_dkd_and_the_row_for_cross_entropy(backend, dtype, mode, loss, ce_weight):
    student, teacher, target = logits(33, 21, dtype)
    soft = 0.7 * F.one_hot(target, 21) + 0.3 * F.one_hot((target + 1) % 21, 21)
    settings = {"normalize": mode, "ce_weight": ce_weight}
    truth, slack = exact(loss, student, teacher, soft, **settings), Slack()
    if backend == "cpu" and ce_weight and dtype == torch.bfloat16:
        # the compiled op leaves the cross-entropy of soft labels to torch: both gradients are rounded before their sum
        slack = Slack(grad=2**-8 * truth.grad.abs().max().item())
    check(loss, student, teacher, soft, truth=truth, slack=slack, backend=backend, **settings)
    _, parts = loss(student, teacher, soft, return_parts=True, backend=backend)
    torch.testing.assert_close(
        parts["ce"].double(), F.cross_entropy(student.double(), soft.double()), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(parts["kd"], loss(student, teacher, target, backend=backend))


@on_every_engine
@both_losses
@every_reduction
def test_target_teacher_is_the_teachers_argmax(pair, backend, loss, reduction):
    student, teacher, _ = pair
    settings = {"ce_weight": 0.5, "normalize": "class", "reduction": reduction, "backend": backend}
    expected = loss(student, teacher, teacher.argmax(1), **settings)
    assert (loss(student, teacher, "teacher", **settings) == expected).all()


@on_every_engine
def test_kd_needs_no_target(pair, backend):
    student, teacher, target = pair
    value, parts = kd_loss(student, teacher, return_parts=True, backend=backend)
    assert value == kd_loss(student, teacher, target, backend=backend)
    assert parts.keys() == {"kd"}


@on_every_engine
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@every_reduction
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_torchs(pair, backend, smoothing, reduction, soft):
    student, teacher, target = pair
    target = teacher.softmax(1) if soft else target.index_fill(0, torch.tensor([2]), -100)
    settings = {"label_smoothing": smoothing, "reduction": reduction}
    expected = F.cross_entropy(student, target, **settings)
    torch.testing.assert_close(cross_entropy(student, target, **settings), expected)
    whole = kd_loss(student, teacher, target, kd_weight=0.0, ce_weight=1.0, **settings, backend=backend)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(gradient(whole, student), gradient(expected, student))


# weights, parts and reductions


@on_every_engine
@both_losses
@every_mode
def test_the_mean_is_over_rows_not_over_elements(pair, backend, loss, mode):
    student, teacher, target = pair
    settings = {"normalize": mode, "ce_weight": 0.5, "backend": backend}
    for reduction, over in (("mean", torch.mean), ("sum", torch.sum)):
        rows = loss(student, teacher, target, reduction="none", **settings)
        assert rows.shape == (6,)
        value = loss(student, teacher, target, reduction=reduction, **settings)
        torch.testing.assert_close(value, over(rows))
        torch.testing.assert_close(gradient(value, student), gradient(over(rows), student))


@on_every_engine
@every_dtype
@both_losses
@every_mode
@every_reduction
def test_the_gradient_is_scaled_by_what_comes_from_above(backend, dtype, loss, mode, reduction):
    student, teacher, target = logits(19, 23, dtype)
    settings = {"normalize": mode, "ce_weight": 0.5, "reduction": reduction}
    factor = (
        1 + torch.rand(19, generator=torch.Generator().manual_seed(2)) if reduction == "none" else torch.tensor(3.0)
    )

    def scaled(s, *others, return_parts, **kind):
        value, parts = loss(s, *others, return_parts=True, **kind)
        return value * factor.to(value.dtype), parts

    # a mean's or sum's gradient is there before what multiplies it: bfloat16 is rounded again, float16 is kept wide
    slack = Slack(roundings=2 if backend == "cpu" and dtype == torch.bfloat16 and reduction != "none" else 1)
    check(scaled, student, teacher, target, slack=slack, backend=backend, **settings)
    leaf = student.clone().requires_grad_()
    assert (gradient(loss(leaf, teacher, target, **settings, backend=backend) * 0, leaf) == 0).all()


@on_every_engine
@both_losses
@every_mode
@every_reduction
def test_a_gradient_scaler_reaches_float16_gradients_before_they_are_rounded(backend, loss, mode, reduction):
    inputs = logits(64, 1000, torch.float16)  # gradients of 1e-6: the smallest number of float16 is 6e-8
    settings = {"normalize": mode, "reduction": reduction, "kd_weight": 1.0 if reduction == "mean" else 1 / 64}

    def scaled(*args, **kind):
        value, parts = loss(*args, **kind)
        return value * 2.0**10, parts

    _, grad, _ = run(scaled, *inputs, **settings, backend=backend)
    check_grad(grad, exact(scaled, *inputs, **settings))


@on_every_engine
def test_a_loss_may_be_differentiated_twice_over_when_its_graph_is_kept(pair, backend):
    student, teacher, target = pair
    for reduction in ("mean", "none"):
        value = dkd_loss(student, teacher, target, reduction=reduction, backend=backend).sum()
        (first,) = torch.autograd.grad(value, student, retain_graph=True)
        (second,) = torch.autograd.grad(value, student)
        assert torch.equal(first, second)


@on_every_engine
@both_losses
def test_without_a_gradient_to_compute_the_loss_is_the_same(pair, backend, loss):
    student, teacher, target = pair
    settings = {"normalize": "class", "ce_weight": 0.5, "backend": backend}
    value = loss(student, teacher, target, **settings)
    with torch.no_grad():
        assert loss(student, teacher, target, **settings) == value
    plain = loss(student.detach(), teacher, target, **settings)
    assert plain == value
    assert not plain.requires_grad


@on_every_engine
def test_parts_are_unweighted_detached_means_that_add_up(pair, backend):
    student, teacher, target = pair
    settings = {"alpha": 0.5, "beta": 3.0, "kd_weight": 0.7, "ce_weight": 0.2, "backend": backend}
    value, parts = dkd_loss(student, teacher, target, reduction="sum", return_parts=True, **settings)
    assert parts.keys() == {"ce", "kd", "tckd", "nckd"}
    assert not any(part.requires_grad or part.dim() for part in parts.values())
    torch.testing.assert_close(parts["kd"], 0.5 * parts["tckd"] + 3.0 * parts["nckd"])
    torch.testing.assert_close(value.detach(), 6 * (0.7 * parts["kd"] + 0.2 * parts["ce"]))
    alone = dkd_loss(student, teacher, target, alpha=1.0, beta=0.0, backend=backend)
    torch.testing.assert_close(parts["tckd"], alone.detach())
    _, by_row = dkd_loss(student, teacher, target, reduction="none", return_parts=True, **settings)
    torch.testing.assert_close(by_row, parts)


@on_every_engine
def test_cross_entropy_is_among_the_parts_at_a_weight_of_zero(pair, backend):
    _, parts = kd_loss(*pair, return_parts=True, ce_weight=0.0, backend=backend)
    torch.testing.assert_close(parts["ce"], F.cross_entropy(pair[0], pair[2]).detach())


@on_every_engine
def test_t_squared_keeps_the_size_of_the_gradient(pair, backend):
    student, teacher, _ = pair
    losses = [kd_loss(student, teacher, temperature=t, backend=backend) for t in (50.0, 500.0)]
    sizes = [gradient(value, student).norm().item() for value in losses]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@on_every_engine
@every_dtype
def test_weights_may_be_tensors_of_any_dtype_and_do_not_change_the_dtype_of_the_loss(pair, backend, dtype):
    student, teacher, target = (z.to(dtype) if z.is_floating_point() else z for z in pair)
    numbers = {"alpha": 0.5, "beta": 3.0, "kd_weight": 0.75, "ce_weight": 0.25}
    value = dkd_loss(student, teacher, target, **numbers, backend=backend)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for kind in (torch.float64, torch.float32, torch.float16, torch.int64):
        tensors = {name: torch.tensor(number, dtype=kind) for name, number in numbers.items()}
        plain = {name: tensor.item() for name, tensor in tensors.items()}
        found = dkd_loss(student, teacher, target, **tensors, backend=backend)
        assert found.dtype == value.dtype
        torch.testing.assert_close(found, dkd_loss(student, teacher, target, **plain, backend=backend))


@on_every_engine
@every_dtype
@every_mode
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16], ids=str)
def test_beta_may_differ_by_row(backend, dtype, mode, kind):
    student, teacher, target = logits(40, 21, dtype)
    beta = torch.arange(40).to(kind) / 4
    target[7] = target[30] = -100
    check(dkd_loss, student, teacher, target, beta=beta, normalize=mode, ce_weight=0.5, backend=backend)
    rows = dkd_loss(student, teacher, target, beta=beta, reduction="none", backend=backend)
    for i in (3, 7, 39):
        one = [x[i : i + 1] for x in (student, teacher, target)]
        alone = dkd_loss(*one, beta=beta[i].item(), reduction="none", backend=backend)
        torch.testing.assert_close(rows[i : i + 1], alone)


def test_a_learned_temperature_gets_a_gradient(pair):
    student, teacher, _ = pair
    temperature = torch.tensor(3.0, requires_grad=True)
    kd_loss(student, teacher, temperature=temperature).backward()
    assert temperature.grad.abs() > 0
