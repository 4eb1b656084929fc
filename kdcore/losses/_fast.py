"""The eager fast path on the CPU: ``kdcore::fused`` beneath the dispatcher, with an autograd function of its own.

Values and gradients are bit for bit those of the registered op. What is saved is what torch does around it, which for a
small batch takes several times as long as the loss itself.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from ._extension import autograd
from ._ops import DEFAULT_EPS, MODES, NO_SECOND_DERIVATIVE, available_backends, named_parts, scaled_gradient
from .reference import Result, Target, Weight

PLAIN = (Tensor, torch.nn.Parameter)
_KINDS = {  # what the words mean to the op: normalize, eps, through, mean
    (mode, stats, reduction): (MODES[mode], DEFAULT_EPS[mode], stats == "batch", reduction == "mean")
    for mode, stats, reduction in itertools.product(MODES, ("batch", "detached"), ("mean", "sum"))
    if stats == "batch" or mode == "class"
}

is_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

try:  # names that torch does not promise: without one of them every call goes the registered way
    _count_modes = torch._C._len_torch_dispatch_stack
    _is_traced = torch._C._is_tracing
    _is_kept = torch._C._autograd._get_current_graph_task_keep_graph
    _CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    _fused = torch.ops.kdcore.fused.default._handle.redispatch_boxed  # straight to the kernel
    there_is = "cpu" in available_backends() and (forward_ad._current_level, profiler._is_profiler_enabled) is not None
    """Whether there is such a path."""
except AttributeError:
    there_is = False
_autograd = autograd()


def usual_loss(
    decoupled: bool,
    student: Tensor,
    teacher: Tensor,
    target: Target,
    settings: tuple[Any, ...],  # in the order of Settings
    alpha: Weight,
    beta: Weight,
) -> Result | None:
    """The loss of a call with arguments of the usual kinds; None for every other call.

    Here is no more than a glance at what the op does not check, written out because calls would double its time. If the
    op refuses, or anything fails, the answer is None as well: the caller's checks have the words for it.
    """
    temperature, normalize, eps, kd_weight, ce_weight, smoothing, ignore_index, stats, reduction, with_parts = settings
    try:
        mode, default_eps, through, mean = _KINDS[normalize, stats, reduction]
        numbers = temperature + kd_weight + ce_weight + smoothing + alpha + beta
        if _is_traced() or not (
            (type(numbers) is float or type(numbers) is int)  # so none of them is a tensor
            and math.isfinite(numbers)
            and temperature > 0
            and 0 <= smoothing <= 1
            and eps is None
            and (type(student) in PLAIN and student.is_cpu and not student.is_neg())
            and (type(teacher) in PLAIN and teacher.is_cpu and not teacher.is_neg())
            and (
                (not decoupled and ce_weight == 0)
                if target is None
                else (type(target) is Tensor and target.is_cpu and target.dim() == 1)
            )
            and (mode != 1 or student.size(0) != 1)
            and student.dtype is not torch.float16  # see compiled.loss
            and not is_transformed()
            and forward_ad._current_level < 0
            and not profiler._is_profiler_enabled
            and not _count_modes()
        ):
            return None
        with_ce = target is not None and (with_parts or ce_weight != 0)
        loss, parts = fused(
            student, teacher, target, None, None, temperature, alpha, beta, kd_weight, ce_weight, smoothing,
            default_eps, ignore_index, mode, decoupled, with_ce, through, mean,
        )  # fmt: skip
    except (RuntimeError, IndexError, KeyError, TypeError):
        return None
    return (loss, named_parts(parts, decoupled, with_ce)) if with_parts else loss


def takes(*tensors: Tensor | None) -> bool:
    """Whether :func:`fused` can read these as they lie in memory, and nobody watches the dispatcher."""
    plain = all(z is None or (type(z) in PLAIN and z.is_cpu and not z.is_neg()) for z in tensors)
    watched = is_transformed() or profiler._is_profiler_enabled or _count_modes() or _is_traced()
    return there_is and plain and not watched


def fused(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and parts by ``kdcore::fused``, whose arguments these are, but the last."""
    if _autograd is not None:
        result: tuple[Tensor, Tensor] = _autograd.fused(NO_SECOND_DERIVATIVE, student, *arguments)
        return result
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    loss, parts, grad = _fused(_CPU, student, *arguments, needs_grad)
    return (_with_gradient(student, (loss, grad)) if needs_grad else loss), parts


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient was computed with it; csrc/autograd has its twin, for the torch that it was built with."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
        loss, grad = known
        ctx.save_for_backward(grad, loss)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        grad, loss = ctx.saved_tensors
        if torch.is_grad_enabled() or not _is_one(grad_loss):
            return scaled_gradient(grad, grad_loss, loss), None
        return grad.clone() if _is_kept() else grad, None  # itself: a leaf takes it over without a copy


# apply without its look for functorch, which has been had
_with_gradient = super(torch.autograd.Function, _KnownGradient).apply


def _is_one(grad_loss: Tensor) -> bool:
    try:
        return not torch.compiler.is_compiling() and grad_loss.item() == 1
    except RuntimeError:  # under vmap it is many numbers
        return False
