"""The distillation losses as functions: arguments are checked here, once, and trusted below.

Both compute a whole objective in one call: ``kd_weight`` x distillation + ``ce_weight`` x cross-entropy. A usual call
goes straight to the kernel (csrc/autograd), another one that the op can do to the registered op (``compiled``), and
what it cannot do to plain torch (``reference``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import Normalize, _check, _group, compiled, reference
from ._extension import autograd
from ._ops import NO_SECOND_DERIVATIVE, Backend, choose_backend, named_parts
from .reference import Reduction, Result, Settings, Statistics, Target, Weight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_eager = autograd()
"""The usual calls on the CPU, in C++; it gives None for the others."""


class KDSettings(TypedDict, total=False):
    """The keyword arguments of :func:`kd_loss` but ``return_parts``."""

    temperature: Weight
    normalize: Normalize
    eps: float | None
    kd_weight: Weight
    ce_weight: Weight
    label_smoothing: float
    ignore_index: int
    stats: Statistics
    group: ProcessGroup | None
    reduction: Reduction
    teacher_grad: bool
    backend: Backend


class DKDSettings(KDSettings, total=False):
    """The keyword arguments of :func:`dkd_loss` but ``return_parts``."""

    alpha: Weight
    beta: Weight


@overload
def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Target = None,
    *,
    return_parts: Literal[False] = False,
    **settings: Unpack[KDSettings],
) -> Tensor: ...
@overload
def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Target = None,
    *,
    return_parts: Literal[True],
    **settings: Unpack[KDSettings],
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def kd_loss(
    student: Tensor, teacher: Tensor, target: Target = None, *, return_parts: bool, **settings: Unpack[KDSettings]
) -> Result: ...
def kd_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    target: Target = None,  # [B] int64, [B, C] soft, or "teacher"
    *,
    temperature: Weight = 4.0,
    normalize: Normalize = "none",
    eps: float | None = None,
    kd_weight: Weight = 1.0,
    ce_weight: Weight = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    stats: Statistics = "batch",
    group: ProcessGroup | None = None,
    reduction: Reduction = "mean",
    return_parts: bool = False,
    teacher_grad: bool = False,
    backend: Backend = "auto",
) -> Result:
    """Knowledge distillation, with cross-entropy in the same call.

    ``kd_weight * T^2 * KL(softmax(h_t / T) || softmax(h_s / T)) + ce_weight * CE(student, target)``, averaged over
    the B rows, where h are the logits after ``normalize``. Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2;
    with ``normalize="class"`` it is LumiNet's loss (TMLR 2025) at weight T^2, with ``"instance"`` logit
    standardisation (Sun et al., CVPR 2024).

    Sums and statistics are accumulated in float32 (float64 for float64 logits). The loss is float32 for half
    logits, the gradient has the logits' dtype. The teacher is detached unless ``teacher_grad``.

    The compiled op computes the gradient with the loss, in the same passes. Its results do not depend on the number of
    threads. It is differentiable once: ``create_graph=True`` works, but differentiating the gradient is a RuntimeError;
    ``backend="reference"`` is differentiable any number of times. torch.compile takes a call as one graph, and compiles
    nothing anew for another temperature or weight.

    Args:
        student: [B, C] logits, floating, C >= 2. -inf marks a masked class (``normalize="none"`` only): the loss is
            finite if the teacher has it too.
        teacher: [B, C] logits of the student's dtype and device.
        target: labels [B] int64, soft labels [B, C], or "teacher" for the teacher's argmax. Needed by cross-entropy
            alone, but rows labelled ``ignore_index`` are left out of everything.
        temperature: T > 0; a 0-d tensor is learned: it gets a gradient.
        normalize: "none"; "class": each class to zero mean and unit biased variance over the batch; "instance": each
            row to zero mean and unit unbiased standard deviation over the classes. Applied to both sides, before T;
            cross-entropy sees the raw logits. "class" leaves every class's scale and offset open, so give it
            ``ce_weight``, or another loss that decides which class is predicted.
        eps: added to the variance (class, default 1e-5) or to the deviation (instance, default 1e-7).
        kd_weight: a number or 0-d tensor. It has no common scale across ``normalize``: see docs/losses.md.
        ce_weight: a number or 0-d tensor; anything but the number 0 needs ``target``.
        label_smoothing: share of the uniform distribution in the cross-entropy's target, 0 to 1.
        ignore_index: label of rows that leave the loss, its gradient and the class statistics.
        stats: "batch"; "detached": no gradient through the class statistics; or (mean_s, var_s, mean_t, var_t), each
            [C], used as they are, with their graph.
        group: process group (``torch.distributed.group.WORLD``) whose ranks hold parts of one batch, of any size: class
            statistics are those of all rows, and "mean" is the mean over the rows that count in all ranks, times the
            number of ranks. So the mean over ranks, which DistributedDataParallel takes of gradients, is that of one
            process with the whole batch. "sum" and "none" are of the rank's own rows; gradients are those of the sum of
            all ranks' losses. Every rank must make the same calls, in the same order. Not under torch.compile.
        reduction: "mean" over the rows that count (never over B*C), 0 with zero gradients where there is none;
            "sum"; or "none" for [B], 0 in ignored rows.
        return_parts: also gives the unweighted means over the rows that count, detached: {"kd", "ce"}. T^2 is in
            "kd"; "ce" is there when there is a target.
        teacher_grad: keeps the teacher's graph.
        backend: "auto" is the compiled op for CPU tensors (see :func:`available_backends`) where it can do the call,
            and "reference", plain torch, elsewhere: on other devices, for a tensor as temperature, for weights,
            ``stats`` or (with ``teacher_grad``) a teacher that require a gradient, for 0-d tensors on a GPU or in
            torch.compile, for subclasses of Tensor, and in torch.func or forward-mode differentiation. "cpu" and
            "cuda" ask for the op, or an error that says why not.

    Raises:
        ValueError: a shape, value or combination does not fit, such as a batch of 1 with ``normalize="class"``, or the
            back end asked for cannot do the call.
        TypeError: a dtype does not fit.
        IndexError: a label is outside [0, C). On CUDA, which would have to be waited for, the compiled op gives NaN
            instead, and for the reference the device asserts it.
        RuntimeError: ``backend`` is not in this installation, or the gradient of the compiled op is differentiated.
    """
    settings = (
        temperature, normalize, eps, kd_weight, ce_weight, label_smoothing, ignore_index, stats, reduction, return_parts
    )  # fmt: skip
    return _loss(False, student, teacher, target, settings, 1.0, 1.0, group, teacher_grad, backend)


@overload
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Target,
    *,
    return_parts: Literal[False] = False,
    **settings: Unpack[DKDSettings],
) -> Tensor: ...
@overload
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Target,
    *,
    return_parts: Literal[True],
    **settings: Unpack[DKDSettings],
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def dkd_loss(
    student: Tensor, teacher: Tensor, target: Target, *, return_parts: bool, **settings: Unpack[DKDSettings]
) -> Result: ...
def dkd_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    target: Target,  # [B] int64, [B, C] soft, or "teacher"
    *,
    alpha: Weight = 1.0,
    beta: Weight = 8.0,  # a number, 0-d or [B]
    temperature: Weight = 4.0,
    normalize: Normalize = "none",
    eps: float | None = None,
    kd_weight: Weight = 1.0,
    ce_weight: Weight = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    stats: Statistics = "batch",
    group: ProcessGroup | None = None,
    reduction: Reduction = "mean",
    return_parts: bool = False,
    teacher_grad: bool = False,
    backend: Backend = "auto",
) -> Result:
    """Decoupled knowledge distillation, with cross-entropy in the same call.

    ``kd_weight * T^2 * (alpha * TCKD + beta * NCKD) + ce_weight * CE(student, target)``, averaged over the B rows.
    TCKD is the KL between target and rest, NCKD the KL among the C - 1 other classes; KD is alpha = 1 and
    beta = 1 - p_y of the teacher. Zhao et al., CVPR 2022 (arXiv 2203.08679), equation 7. With two classes NCKD is
    exactly 0.

    Args:
        student: as in :func:`kd_loss`.
        teacher: as in :func:`kd_loss`.
        target: labels [B] int64; soft labels [B, C], whose argmax is the target class (cross-entropy uses the row);
            or "teacher" for the teacher's argmax.
        alpha: weight of TCKD, a number or 0-d tensor.
        beta: weight of NCKD, a number, a 0-d tensor or one per row [B].
        temperature: as in :func:`kd_loss`, like every argument below.
        normalize: see there.
        eps: see there.
        kd_weight: see there.
        ce_weight: see there.
        label_smoothing: see there.
        ignore_index: see there.
        stats: see there.
        group: see there.
        reduction: see there.
        return_parts: gives {"kd", "tckd", "nckd", "ce"}: "kd" is T^2 (alpha TCKD + beta NCKD), "tckd" and "nckd" hold
            T^2 but neither alpha nor beta.
        teacher_grad: see there.
        backend: see there.

    Raises:
        ValueError: as :func:`kd_loss`, and for a target of None.
        TypeError: as :func:`kd_loss`, like the others.
        IndexError: see there.
        RuntimeError: see there.
    """
    settings = (
        temperature, normalize, eps, kd_weight, ce_weight, label_smoothing, ignore_index, stats, reduction, return_parts
    )  # fmt: skip
    return _loss(True, student, teacher, target, settings, alpha, beta, group, teacher_grad, backend)


def cross_entropy(
    student: Tensor,  # [B, C]
    target: Tensor,  # [B] int64, or [B, C] soft
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The cross-entropy of :func:`kd_loss` alone: torch's, but float32 for half logits and 0 where no row counts."""
    _check.check_logits(student)
    _check.check_target(target, student, ignore_index)
    _check.check_label_smoothing(label_smoothing)
    return reference.cross_entropy(student, target, label_smoothing, ignore_index, reduction)


def _loss(
    decoupled: bool,
    student: Tensor,
    teacher: Tensor,
    target: Target,
    arguments: tuple[Any, ...],  # in the order of Settings
    alpha: Weight,
    beta: Weight,
    group: ProcessGroup | None,
    teacher_grad: bool,
    backend: Backend,
) -> Result:
    if _eager is not None and group is None and not teacher_grad and not torch.compiler.is_compiling():
        found = _eager.loss(
            decoupled, student, teacher, target, arguments, alpha, beta, backend, NO_SECOND_DERIVATIVE
        )  # fmt: skip
        if type(found) is tuple:
            return found[0], named_parts(found[1], decoupled, target is not None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    settings = Settings(*arguments)
    _check.check_call(student, teacher, target, settings, group)
    if decoupled:
        _check.check_dkd(student, target, alpha, beta)
    if not teacher_grad:
        teacher, settings = _detached(teacher, settings)
    found = _computed(decoupled, student, teacher, target, settings, alpha, beta, group, backend)
    if group is None or settings.reduction != "mean":
        return found
    share = _group.share(student, reference.resolve_target(target, teacher, settings.ignore_index).valid, group)
    if isinstance(found, tuple):
        value, parts = found
        return (share * value).to(value.dtype), {name: (share * part).to(part.dtype) for name, part in parts.items()}
    return (share * found).to(found.dtype)


def _computed(
    decoupled: bool,
    student: Tensor,
    teacher: Tensor,
    target: Target,
    settings: Settings,
    alpha: Weight,
    beta: Weight,
    group: ProcessGroup | None,
    backend: Backend,
) -> Result:
    """By the op where it can do the call; means are over this process's rows."""
    op = choose_backend(backend, student.device.type)
    if op != "reference":
        problem = compiled.obstacle(op, student, teacher, settings, alpha, beta)
        if problem is None:
            return compiled.loss(decoupled, student, teacher, target, settings, alpha, beta, group)
        if backend != "auto":
            raise ValueError(f'backend="{backend}" cannot do this: {problem}, or backend="reference".')
    if group is not None:
        valid = reference.resolve_target(target, teacher, settings.ignore_index).valid
        settings = _group.with_statistics(settings, student, teacher, valid, group)
    if decoupled:
        return reference.dkd_loss(student, teacher, target, settings, alpha, beta)
    return reference.kd_loss(student, teacher, target, settings)


def _detached(teacher: Tensor, settings: Settings) -> tuple[Tensor, Settings]:
    """The teacher's side, given statistics included, without its graph."""
    if not isinstance(settings.stats, str):
        mean_s, var_s, mean_t, var_t = settings.stats
        settings = replace(settings, stats=(mean_s, var_s, mean_t.detach(), var_t.detach()))
    return teacher.detach(), settings
