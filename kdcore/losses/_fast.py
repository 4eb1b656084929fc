"""The eager fast path on the CPU: ``kdcore::fused`` beneath the dispatcher, its derivative in C++ (csrc/autograd).

Values and gradients are bit for bit those of the registered op. What is saved is what torch does around it, which for a
small batch takes several times as long as the loss itself.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ._extension import autograd
from ._ops import DEFAULT_EPS, MODES, NO_SECOND_DERIVATIVE, named_parts
from .reference import Result, Target, Weight

_KINDS = {  # what the words mean to the op: normalize, eps, through, mean
    (mode, stats, reduction): (MODES[mode], DEFAULT_EPS[mode], stats == "batch", reduction == "mean")
    for mode, stats, reduction in itertools.product(MODES, ("batch", "detached"), ("mean", "sum"))
    if stats == "batch" or mode == "class"
}
_autograd = autograd()


def there_is() -> bool:
    return _autograd is not None


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
        if not (
            (type(numbers) is float or type(numbers) is int)  # so none of them is a tensor
            and math.isfinite(numbers)
            and temperature > 0
            and 0 <= smoothing <= 1
            and eps is None
            and ((not decoupled and ce_weight == 0) if target is None else target.dim() == 1)  # type: ignore[union-attr]
            and (mode != 1 or student.size(0) != 1)
            and student.dtype is not torch.float16  # see compiled.loss
        ):
            return None
        with_ce = target is not None and (with_parts or ce_weight != 0)
        found = fused(
            student, teacher, target, None, None, temperature, alpha, beta, kd_weight, ce_weight, smoothing,
            default_eps, ignore_index, mode, decoupled, with_ce, through, mean,
        )  # fmt: skip
    except (RuntimeError, IndexError, KeyError, TypeError, AttributeError):
        return None
    if found is None:
        return None
    loss, parts = found
    return (loss, named_parts(parts, decoupled, with_ce)) if with_parts else loss


def fused(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor] | None:
    """Loss and parts by ``kdcore::fused``, whose arguments these are, but the last.

    None where the call is for the dispatcher: tensors that are not plain ones on the CPU, or somebody who watches it.
    """
    if _autograd is None:
        return None
    result: tuple[Tensor, Tensor] | None = _autograd.fused(NO_SECOND_DERIVATIVE, student, *arguments)
    return result
