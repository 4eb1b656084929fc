"""Feature maps of different sizes, made alike."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore import PlanError, Shapes

from .pairs import Pair, pairs


def map_pairs(shapes: Shapes) -> tuple[Pair, ...]:
    """Corresponding taps, all of them maps [C, H, W].

    Raises:
        PlanError: a side has no tap, or one that is no map.
    """
    found = pairs(shapes)
    for side, names in zip((shapes.student, shapes.teacher), zip(*found, strict=True), strict=True):
        for name in names:
            if len(side[name]) != 3:
                what = f"a map [C, H, W] is needed, but it is {list(side[name])}"
                raise PlanError(what, where=f"tap {name!r}", fix="Name taps of a convolutional network.")
    return found


def averages(length: int, count: int, like: Tensor) -> Tensor:
    """[count, length]: the matrix that takes means over ``count`` cells of an axis, as adaptive pooling does.

    Cell i covers floor(i length / count) to ceil((i + 1) length / count). As a product its gradient is deterministic on
    a GPU, unlike adaptive pooling's.
    """
    place, cell = torch.arange(length, device=like.device), torch.arange(count, device=like.device)[:, None]
    inside = (place >= cell * length // count) & (place < -(-(cell + 1) * length // count))
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


def alike(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, C, H, W], the larger one pooled to the height and width of the smaller."""
    height, width = (min(own.shape[axis], other.shape[axis]) for axis in (2, 3))
    return _pool(own, height, width), _pool(other, height, width)


def _pool(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[2] > height:
        maps = averages(maps.shape[2], height, maps) @ maps
    return maps @ averages(maps.shape[3], width, maps).T if maps.shape[3] > width else maps
