"""The losses by the compiled op: the twin of ``reference``, for every call that the op can do.

Arguments are checked by then. "mean" and "sum" are one call of ``kdcore::fused`` (of ``kdcore::prepare`` for a gradient
on CUDA), "none" is one of ``kdcore::forward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from . import _group, reference
from ._ops import DEFAULT_EPS, MODES, named_parts, numbers_tensor
from .normalise import accumulator
from .reference import Labels, Result, Settings, Target, Weight

_NO_LABEL = -100  # where no label is to be ignored
_is_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def obstacle(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    settings: Settings,
    alpha: Weight,
    beta: Weight,
) -> str | None:
    """Why the op of this back end cannot take the call, and what to pass; None where it can.

    The teacher and its statistics come without a graph, unless theirs is asked for.
    """
    compiling = torch.compiler.is_compiling()
    if student.device.type != backend:
        return f"student is on {student.device}. Pass tensors on {backend}"
    if not compiling and any(type(z) not in (Tensor, torch.nn.Parameter) for z in (student, teacher)):
        return "student or teacher is of a subclass of Tensor. Pass plain tensors"
    if _is_transformed() or forward_ad._current_level >= 0:
        return "a transform of torch.func, or forward-mode differentiation, is active. Call it outside"
    if isinstance(settings.temperature, Tensor):
        return "temperature is a tensor. Pass a number"
    weights = {"kd_weight": settings.kd_weight, "ce_weight": settings.ce_weight, "alpha": alpha, "beta": beta}
    for name, weight in weights.items():
        if isinstance(weight, Tensor) and weight.dim() == 0 and (compiling or not weight.is_cpu):
            return f"{name} is a tensor, whose value is not known here. Pass a number"
    if _wants_gradient(teacher):
        return "teacher_grad=True asks for the teacher's gradient, which the op does not give. Pass teacher.detach()"
    stats = () if isinstance(settings.stats, str) else settings.stats
    for name, given in (*weights.items(), *(("stats", part) for part in stats)):
        if _wants_gradient(given):
            return f"{name} requires a gradient, which the op does not give. Detach it"
    return None


def _wants_gradient(z: Weight) -> bool:
    return isinstance(z, Tensor) and z.requires_grad and torch.is_grad_enabled()


def loss(
    decoupled: bool,
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    target: Target,
    settings: Settings,
    alpha: Weight,
    beta: Weight,  # a number, 0-d or [B]
    group: ProcessGroup | None = None,
) -> Result:
    if student.dtype == torch.float16 and student.requires_grad and not student.is_cuda:
        # a gradient kept in float16 would have lost its small elements before a gradient scaler can raise them
        student, teacher = student.float(), teacher.float()
    index, ignored = _labels(target, teacher, settings.ignore_index)
    rows = target if isinstance(target, Tensor) and target.dim() == 2 else None  # the op has hard labels alone
    ce_weight = _number(settings.ce_weight)
    with_ce = index is not None and (settings.return_parts or ce_weight != 0)
    stats, total = _statistics(student, teacher, index, ignored, settings, group)
    tensors = (student, teacher, index, _row_beta(student, beta), stats)
    numbers = _numbers(settings, alpha, beta, 0.0 if rows is not None else ce_weight)
    rest = (ignored, MODES[settings.normalize], decoupled, with_ce and rows is None, settings.stats == "batch")
    if settings.reduction == "none" or total is not None:
        value, each = _rows(tensors, numbers, rest, total, group)
        count = _count(student, index, ignored)
        parts = each.sum(1) / count
        if settings.reduction != "none":
            value = value.sum() / count if settings.reduction == "mean" else value.sum()
    else:
        value, parts = _fused(tensors, numbers, (*rest, settings.reduction == "mean"))
    soft = {}
    if rows is not None and with_ce:
        labels = Labels(index=index, rows=rows)
        ce = reference.cross_entropy_rows(student.to(accumulator(student)), labels, settings.label_smoothing)
        value = value + ce_weight * reference.reduce_rows(ce, None, settings.reduction) if ce_weight != 0 else value
        soft = {"ce": reference.reduce_rows(ce.detach(), None, "mean")}
    return (value, {**named_parts(parts, decoupled, with_ce), **soft}) if settings.return_parts else value


# What the op is given


def _labels(target: Target, teacher: Tensor, ignore_index: int) -> tuple[Tensor | None, int]:
    """The labels, and which of them is to be left out."""
    if target is None:
        return None, _NO_LABEL
    if isinstance(target, str):
        return teacher.argmax(1), _NO_LABEL
    return (target.argmax(1), _NO_LABEL) if target.dim() == 2 else (target, ignore_index)


def _row_beta(student: Tensor, beta: Weight) -> Tensor | None:  # [B]
    return beta.detach().to(accumulator(student)) if isinstance(beta, Tensor) and beta.dim() else None


def _statistics(
    student: Tensor,
    teacher: Tensor,
    index: Tensor | None,
    ignored: int,
    settings: Settings,
    group: ProcessGroup | None,
) -> tuple[Tensor | None, Tensor | None]:  # [4, C] and 0-d, float64
    """Given ones; or those of the batch, where the op does not take them itself, with the group's count of rows."""
    if not isinstance(settings.stats, str):
        return torch.stack([part.detach().double() for part in settings.stats]), None
    if settings.normalize != "class" or (settings.reduction != "none" and group is None):
        return None, None
    sides = [torch.ops.kdcore.col_stats(z.detach(), index, ignored) for z in (student, teacher)]
    count, (mean, m2) = sides[0][0], (torch.stack([side[part] for side in sides]) for part in (1, 2))
    if group is not None:
        count, mean, m2 = _group.merged(count, mean, m2, group)
    stats = torch.stack([mean, m2 / count.clamp(min=1)], dim=1).flatten(0, 1)
    return stats, None if group is None else count


def _numbers(settings: Settings, alpha: Weight, beta: Weight, ce_weight: float) -> tuple[Weight, ...]:
    by_row = isinstance(beta, Tensor) and beta.dim() > 0
    return (
        settings.temperature,
        _number(alpha),
        0.0 if by_row else _number(beta),
        _number(settings.kd_weight),
        ce_weight,
        settings.label_smoothing,
        DEFAULT_EPS[settings.normalize] if settings.eps is None else settings.eps,
    )


def _number(weight: Weight) -> float:
    return float(weight) if isinstance(weight, Tensor) else weight


def _count(student: Tensor, index: Tensor | None, ignored: int) -> Tensor | int:
    return max(student.shape[0], 1) if index is None else (index != ignored).sum().clamp(min=1)


# How it is called


def _rows(
    tensors: tuple[Any, ...], numbers: tuple[Any, ...], rest: tuple[Any, ...], total: Tensor | None, group: Any
) -> Any:
    """Loss [B] and parts [4, B] of each row; through statistics of a group there is a way to the others' rows."""
    through = rest[-1]
    if total is None or not through:
        return _call("forward", tensors, numbers, rest)
    return _group.Rows.apply(*tensors, (*numbers, *rest), total, group)


def _fused(tensors: tuple[Any, ...], numbers: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    student = tensors[0]
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if needs_grad and student.is_cuda:  # whose gradient is computed when it is asked for, with the factor in it
        value, parts, _ = _call("prepare", tensors, numbers, rest)
    else:
        value, parts, _ = _call("fused", tensors, numbers, (*rest, needs_grad))
    return value, parts


def _call(name: str, tensors: tuple[Any, ...], numbers: tuple[Any, ...], rest: tuple[Any, ...]) -> Any:
    if torch.compiler.is_compiling():
        return getattr(torch.ops.kdcore, f"{name}_dynamic")(*tensors, numbers_tensor(numbers), *rest)
    return getattr(torch.ops.kdcore, name)(*tensors, *numbers, *rest)
