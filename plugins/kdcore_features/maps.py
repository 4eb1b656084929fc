"""Feature maps: which features are some, and how those of different sizes are made alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import PlanError, Shapes

from .pairs import Pair, pairs


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
    rows, columns = (averages(a, b, feature) for a, b in zip(before, size, strict=True))
    return rows @ feature @ columns.T


def averages(length: int, count: int, like: Tensor) -> Tensor:
    """[count, length]: the matrix that takes means over ``count`` cells of an axis, as adaptive pooling does.

    Cell i covers floor(i length / count) to ceil((i + 1) length / count). As a product its gradient is deterministic on
    a GPU, unlike adaptive pooling's.
    """
    place, cell = torch.arange(length, device=like.device), torch.arange(count, device=like.device)[:, None]
    inside = (place >= cell * length // count) & (place < -(-(cell + 1) * length // count))
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


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
