"""Which of the learner's features is compared with which of the source's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
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


def is_map(shape: tuple[int, ...]) -> bool:
    """True for [C, H, W]; tokens are [N, D], a vector is [D]."""
    return len(shape) == 3


def map_pairs(shapes: Shapes, least: int = 1) -> tuple[Pair, ...]:
    """:func:`pairs` of a loss that compares maps alone, ``least`` of them at least.

    Raises:
        PlanError: a feature is no map, or there are too few.
    """
    found = pairs(shapes)
    other = [tap for tap, shape in [*shapes.student.items(), *shapes.teacher.items()] if not is_map(shape)]
    if other:
        fix = "Name taps of maps [C, H, W], or use fitnet or vid, which take every feature."
        raise PlanError(f"tap {other[0]!r} is no map", where="student and teacher", fix=fix)
    if len(found) < least:
        fix = f"Name at least {least} taps on each side, shallow to deep."
        raise PlanError(f"{len(found)} tap to compare, but stages are compared with their neighbours", fix=fix)
    return found


def match(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, H, W], each averaged over cells to the smaller height and the smaller width."""
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    return pooled(student, size), pooled(teacher, size)


def pooled(feature: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map [B, C, H, W] averaged over h x w cells, which overlap where h does not divide H.

    The values are those of adaptive pooling; but for its gradient, which on a GPU is not deterministic, it would be it.
    """
    before = tuple(feature.shape[2:])
    if before == size:
        return feature
    if all(a % b == 0 for a, b in zip(before, size, strict=True)):
        return F.avg_pool2d(feature, tuple(a // b for a, b in zip(before, size, strict=True)))
    rows, columns = (_cells(a, b, feature) for a, b in zip(before, size, strict=True))
    return rows @ feature @ columns.T


def _cells(length: int, count: int, like: Tensor) -> Tensor:
    """[count, length]: the weights of the means over [floor(i length / count), ceil((i + 1) length / count))."""
    cell, place = torch.arange(count, device=like.device)[:, None], torch.arange(length, device=like.device)
    inside = (place >= cell * length // count) & (place < ((cell + 1) * length + count - 1) // count)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of a loss's stages."""
    return torch.stack(list(parts)).sum()
