"""Which of the learner's features is compared with which of the source's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from kdcore import Outputs, PlanError, Shapes

from .options import TapOptions

Pair: TypeAlias = tuple[str, str]


def taps(options: TapOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that the framework asks a loss for."""
    return options.student, options.teacher


def pairs(shapes: Shapes) -> tuple[Pair, ...]:
    """Taps of the learner and of the source, shallow to deep.

    Where one side has fewer, the other's first ones are left out: a VGG has five stages, a ResNet three or four, and
    the last ones correspond.

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


def map_shape(shapes: Mapping[str, tuple[int, ...]], tap: str) -> tuple[int, int, int]:
    """(C, H, W) of a map, or of a vector as a map of one position.

    Raises:
        PlanError: the feature is neither.
    """
    shape = shapes[tap]
    if len(shape) not in (1, 3):
        fix = "Name taps that give maps [C, H, W] or vectors [C]."
        raise PlanError(f"shape {list(shape)} is no map", where=f"tap {tap!r}", fix=fix)
    return (shape[0], 1, 1) if len(shape) == 1 else (shape[0], shape[1], shape[2])


def as_map(feature: Tensor) -> Tensor:
    """[B, C, H, W] of a map, or of a vector [B, C] as a map of one position."""
    return feature if feature.ndim == 4 else feature[:, :, None, None]
