"""The fast path around the compiled op, its gradients, and the calls that are not for it."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwd
from op_samples import (
    MODES,
    both_losses,
    every_dtype,
    every_mode,
    sample,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kdcore.losses import compiled, dkd_loss, functional, kd_loss
from kdcore.losses._extension import why_not

pytestmark = pytest.mark.usefixtures("compiled_op")


@pytest.fixture(params=["fast", "registered"], autouse=True)
def way(request, monkeypatch):
    if request.param == "registered":
        monkeypatch.setattr(functional, "_eager", None)
    elif functional._eager is None:
        assert os.environ.get("KDCORE_REQUIRE_EXT") != "1", why_not("autograd")
        pytest.skip(f"no fast path: {why_not('autograd')}")


fast_alone = pytest.mark.parametrize("way", ["fast"], indirect=True)


# the fast path


def gradient(value, student, **settings):
    return torch.autograd.grad(value.sum(), student, **settings)[0]


def fast(value):
    return value.grad_fn.name() == "KdcoreLoss"


USUAL = [
    {"normalize": mode, "reduction": reduction, "ce_weight": ce_weight}
    for mode, reduction, ce_weight in itertools.product(MODES, ("mean", "sum"), (0.0, 0.5))
] + [{"normalize": "class", "stats": "detached"}, {"temperature": 2, "kd_weight": 3, "label_smoothing": 0.1}]


@fast_alone
@both_losses
@every_dtype
@pytest.mark.parametrize("settings", USUAL, ids=str)
def test_the_fast_path_is_the_registered_op_bit_for_bit(loss, dtype, settings, monkeypatch):
    student, teacher, index = sample(9, 7, dtype)
    student.requires_grad_()
    found = []
    for expected in (True, False):
        if not expected:
            monkeypatch.setattr(functional, "_eager", None)
        value, parts = loss(student, teacher, index, **settings, return_parts=True)
        assert fast(value) == (expected and dtype != torch.float16)  # whose gradient is kept in float32
        grads = [gradient(factor * value, student, retain_graph=True) for factor in (1, 3)]
        assert all(grad.dtype == dtype for grad in grads)
        found.append((value, parts, grads, loss(student, teacher, index, **settings)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@fast_alone
@both_losses
@pytest.mark.parametrize("settings", USUAL, ids=str)
def test_usual_calls_are_not_looked_at_twice(loss, settings, monkeypatch):
    student, teacher, index = sample()
    monkeypatch.setattr(compiled, "loss", None)
    for leaf in (student, student.requires_grad_(), torch.nn.Parameter(student.detach())):
        for parts in (False, True):
            loss(leaf, teacher, index, **settings, return_parts=parts)


@fast_alone
def test_a_leaf_takes_over_the_gradient_that_the_op_wrote():
    student, teacher, index = sample()
    value = dkd_loss(student.requires_grad_(), teacher, index)
    seen = []
    value.grad_fn.register_hook(lambda grads, _: seen.append(grads[0].data_ptr()))
    value.backward()
    assert seen == [student.grad.data_ptr()]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_may_be_changed_in_place(reduction):
    student, teacher, index = sample()
    student.requires_grad_()
    value = dkd_loss(student, teacher, index, reduction=reduction).clone()
    expected = gradient(value / 4 + 1, student)
    value = dkd_loss(student, teacher, index, reduction=reduction)
    value /= 4
    value += 1
    assert torch.equal(gradient(value, student), expected)


def test_a_lazy_gradient_is_read_as_it_means():
    student, teacher, index = sample()
    value = dkd_loss(student.requires_grad_(), teacher, index)
    plain = gradient(value, student, retain_graph=True)
    for lazy in (torch._neg_view(torch.ones(())), torch.zeros((), dtype=torch.cfloat).sub(1j).conj().imag):
        (grad,) = torch.autograd.grad(value, student, lazy, retain_graph=True)
        assert torch.equal(grad, plain * lazy)
    (grad,) = torch.autograd.grad(value, student, torch._efficientzerotensor(()))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_numbers_of_numpy_are_numbers():
    student, teacher, index = sample()
    for number in (0, 0.5):
        expected = kd_loss(student, teacher, index, ce_weight=number)
        for kind in (np.float32, np.float64):
            assert torch.equal(kd_loss(student, teacher, index, ce_weight=kind(number)), expected)
    index = index.clamp(min=0)
    expected = kd_loss(student, teacher, index, ignore_index=1, ce_weight=0.5)
    assert torch.equal(kd_loss(student, teacher, index, ignore_index=np.int64(1), ce_weight=0.5), expected)


@fast_alone  # any autograd function in Python, such as the registered op's, can end the process here
def test_two_threads_cannot_both_use_up_a_graph():
    student, teacher, index = sample()
    student.requires_grad_()
    for _ in range(50):
        value = dkd_loss(student, teacher, index)
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(gradient, value, student) for _ in range(2)]
        errors = [str(done.exception()) for done in found if done.exception()]
        assert len(errors) <= 1
        assert all("second time" in error for error in errors)
        if not errors:
            first, second = (done.result() for done in found)
            assert first.data_ptr() != second.data_ptr()


def test_a_graph_that_is_kept_gives_its_gradient_again_and_one_that_is_not_says_so():
    student, teacher, index = sample()
    value = dkd_loss(student.requires_grad_(), teacher, index)
    value.backward(retain_graph=True)
    first = student.grad.clone()
    value.backward()
    assert torch.equal(student.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_gradients_of_float16_logits_survive_a_loss_scale():
    student, teacher, index = sample(dtype=torch.float16)
    student.requires_grad_()
    for reduction in ("mean", "none"):
        value = dkd_loss(student, teacher, index, kd_weight=1e-7, reduction=reduction).sum()
        exact = dkd_loss(student, teacher, index, kd_weight=1e-7, reduction=reduction, backend="reference").sum()
        found, expected = (gradient(2.0**16 * one, student).double() for one in (value, exact))
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-7)


@both_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_where_no_gradient_is_wanted_there_is_no_graph(loss, reduction):
    student, teacher, index = sample()
    plain = loss(student, teacher, index, reduction=reduction)
    student.requires_grad_()
    with torch.no_grad():
        quiet = loss(student, teacher, index, reduction=reduction)
    with torch.inference_mode():
        inferred = loss(student, teacher, index, reduction=reduction)
        rows = teacher.clone()
        with torch.enable_grad():
            inferred_too = loss(student, teacher, index, reduction=reduction)
    for value in (plain, quiet, inferred, inferred_too):
        assert not value.requires_grad
        assert torch.equal(value, loss(student, teacher, index, reduction=reduction))
    loss(student, rows, index, reduction=reduction).sum().backward()  # a teacher computed in inference mode


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_an_error_only_where_it_is_asked_for(reduction):
    student, teacher, index = sample()
    student.requires_grad_()
    factor = torch.tensor(2.0, requires_grad=True)
    value = (factor * dkd_loss(student, teacher, index, reduction=reduction)).sum()
    plain = gradient(value, student, retain_graph=True)
    grad = gradient(value, student, create_graph=True)
    assert torch.equal(grad.detach(), plain)
    penalty = grad.square().sum()
    if reduction == "mean":  # the gradient is linear in what comes from above
        (slope,) = torch.autograd.grad(penalty, factor, retain_graph=True)
        torch.testing.assert_close(slope, penalty.detach())
    for total in (penalty, penalty + student.square().sum()):  # not left out in silence either
        with pytest.raises(RuntimeError, match=r'no second derivative.*backend="reference"'):
            torch.autograd.grad(total, student, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty.backward()


def test_many_gradients_at_once_are_those_of_the_loss():
    student, teacher, index = sample()
    value = dkd_loss(student.requires_grad_(), teacher, index)
    factors = torch.tensor([0.0, 1.0, 2.5])
    (grads,) = torch.autograd.grad(value, student, factors, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(grads, factors[:, None, None] * gradient(value, student))


# what is not for the fast path


def test_logits_that_are_a_lazy_negation_are_read_as_they_mean():
    student, teacher, index = sample()
    expected = kd_loss(-student, teacher, index)
    assert torch.equal(kd_loss(torch._neg_view(student), teacher, index), expected)
    assert torch.equal(kd_loss(-student, torch._neg_view(-teacher), index), expected)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_and_a_profiler_see_the_op():
    student, teacher, index = sample()
    expected = dkd_loss(student.requires_grad_(), teacher, index)
    with Watch() as watch:
        assert dkd_loss(student, teacher, index) == expected
    assert "kdcore.fused.default" in watch.seen
    with WatchFunctions() as functions:
        assert dkd_loss(student, teacher, index) == expected
    assert "kdcore.fused" in functions.seen
    with torch.autograd.profiler.profile() as profile:
        assert dkd_loss(student, teacher, index) == expected
    assert "kdcore::fused" in {event.name for event in profile.function_events}


def test_what_is_not_dense_is_not_read_as_if_it_were():
    student, teacher, index = sample()
    zeros = torch._efficientzerotensor(student.shape)
    assert torch.equal(kd_loss(student, zeros, index), kd_loss(student, torch.zeros_like(student), index))
    for other in (student.to_sparse(), student.to_mkldnn()):
        with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
            kd_loss(other, teacher)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of shapes that are looked at
def test_a_tracer_sees_the_op():
    student, teacher, index = sample()
    traced = torch.jit.trace(lambda s, t: dkd_loss(s, t, index, normalize="class"), (student, teacher))
    assert "kdcore::fused" in str(traced.graph)
    assert torch.equal(traced(2 * student, teacher), dkd_loss(2 * student, teacher, index, normalize="class"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_checkpoint_computes_the_loss_again(reduction):
    student, teacher, index = sample()
    student.requires_grad_()

    def function(s):
        return dkd_loss(2 * s, teacher, index, normalize="class", reduction=reduction)

    found = checkpoint(function, student, use_reentrant=False)
    assert torch.equal(gradient(found, student), gradient(function(student), student))


class Logits(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func.jvp's own
@both_losses
@every_mode
def test_transforms_forward_mode_and_subclasses_go_to_the_reference(loss, mode):
    student, teacher, index = sample(dtype=torch.float64)

    def function(s, **settings):
        return loss(s, teacher, index, normalize=mode, ce_weight=0.5, **settings)

    expected = gradient(function(leaf := student.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(function)(student), expected)
    torch.testing.assert_close(torch.func.vmap(function)(student[None])[0], function(student))
    many = torch.func.vmap(lambda s, y: loss(s, teacher, y, normalize=mode))(student[None], index[None])
    torch.testing.assert_close(many[0], loss(student, teacher, index, normalize=mode))
    slope = (expected * teacher).sum()
    torch.testing.assert_close(torch.func.jvp(function, (student,), (teacher,))[1], slope)
    with fwd.dual_level():
        dual = function(fwd.make_dual(student, teacher))
        torch.testing.assert_close(fwd.unpack_dual(dual).tangent, slope)
    of_subclass = function(student.as_subclass(Logits))
    assert type(of_subclass) is Logits
    torch.testing.assert_close(of_subclass.as_subclass(torch.Tensor), function(student))


def test_the_back_end_asked_for_by_name_says_why_it_cannot():
    student, teacher, index = sample()

    def function(s):
        return kd_loss(s, teacher, index, backend="cpu")

    for call in (lambda: torch.func.grad(function)(student), lambda: torch.func.vmap(function)(student[None])):
        with pytest.raises(ValueError, match=r'transform of torch.func.*backend="reference"'):
            call()
    with pytest.raises(ValueError, match=r'subclass of Tensor.*backend="reference"'):
        function(student.as_subclass(Logits))
    with pytest.raises(ValueError, match=r"student is on meta. Pass tensors on cpu"):
        kd_loss(student.to("meta"), teacher.to("meta"), backend="cpu")
    with pytest.raises(ValueError, match=r"teacher_grad=True.*Pass teacher.detach\(\)"):
        kd_loss(student, teacher.requires_grad_(), backend="cpu", teacher_grad=True)


def test_a_gradient_that_nobody_wants_is_no_obstacle():
    student, teacher, index = sample()
    weight = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        found = dkd_loss(student, teacher, index, kd_weight=weight, backend="cpu")
    assert torch.equal(found, dkd_loss(student, teacher, index, kd_weight=2.0))


def test_gradients_of_a_graph_that_is_kept_share_no_memory():
    student, teacher, index = sample()
    student.requires_grad_()
    value = dkd_loss(2 * student, teacher, index)
    first, second = (gradient(value, student, retain_graph=True) for _ in range(2))
    kept = second.clone()
    first.mul_(2)
    assert torch.equal(second, kept)
    assert torch.equal(gradient(value, student), kept)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_autograd_takes_the_gradient():
    student, teacher, index = sample()
    student.requires_grad_()
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        dkd_loss(student, teacher, index).backward()
    assert torch.equal(student.grad, gradient(dkd_loss(student, teacher, index), student))
