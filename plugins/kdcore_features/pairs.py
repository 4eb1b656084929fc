"""Which of the learner's features is compared with which of the source's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kdcore import Outputs, PlanError, Shapes

from .options import TapOptions

Pair: TypeAlias = tuple[str, str]


def taps(options: TapOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that the framework asks a loss for."""
    return options.student, options.teacher


def pairs(shapes: Shapes) -> tuple[Pair, ...]:
    """Taps of the learner and of the source, shallow to deep.

    Where a pattern finds fewer on one side, the other's first ones are left out: a VGG has five stages, a ResNet three
    or four, and the last ones correspond. Taps that are named one by one are as many on both sides, by their options.

    Raises:
        PlanError: a side has none.
    """
    student, teacher = list(shapes.student), list(shapes.teacher)
    count = min(len(student), len(teacher))
    if not count:
        raise PlanError("no feature to compare", where="student and teacher", fix="Name taps that the models have.")
    return tuple(zip(student[-count:], teacher[-count:], strict=True))


def features(student: Outputs, teacher: Outputs, pair: Pair) -> tuple[Tensor, Tensor]:
    """Both features in float32, or float64 where the learner's is; the source's without its graph."""
    own, other = student.taps[pair[0]], teacher.taps[pair[1]].detach()
    return (
        (own, other.to(own.dtype))
        if own.is_floating_point() and own.element_size() == 8
        else (own.float(), other.float())
    )


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of a loss's stages."""
    return torch.stack(list(parts)).sum()
