"""Distilling knowledge via knowledge review (Chen et al., CVPR 2021, arXiv:2104.09044, section 3).

From the deepest on, each of the student's features is fused with the ones below it (attention-based fusion) and
compared with the teacher's feature of that depth, whole and pooled (hierarchical context loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .maps import as_map, map_shape, pooled
from .options import ReviewKDOptions
from .pairs import features, pairs, taps

WIDEST = 512
LEVELS = (4, 2, 1)


def hcl(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss, 0-d: the sum over stages of a mean of mean squared errors.

    A stage is compared whole, with weight 1, and pooled to 4 x 4, 2 x 2 and 1 x 1, each with half the weight of the one
    before; sizes that are not below its height are left out.

    Args:
        student: maps [B, C, H, W].
        teacher: maps of the same shapes.
    """
    return sum(_stage(own, other) for own, other in zip(student, teacher, strict=True))


def _stage(own: Tensor, other: Tensor) -> Tensor:
    sizes = [size for size in LEVELS if size < own.shape[2]]
    smaller = [[pooled(side, (size, size)) for side in (own, other)] for size in sizes]
    parts = [F.mse_loss(*sides) / 2**level for level, sides in enumerate([[own, other], *smaller])]
    return sum(parts) / (2 - 2.0 ** -len(sizes))  # the sum of the weights


class Fusion(nn.Module):
    """Attention-based fusion of a feature with what comes from the deeper ones.

    Args:
        own: channels of the student's feature.
        middle: channels of what is handed on.
        other: channels of the teacher's feature.
        size: (H, W) of the teacher's feature.
        deepest: True for the first, which nothing comes to.
    """

    def __init__(self, own: int, middle: int, other: int, size: tuple[int, int], deepest: bool) -> None:
        super().__init__()
        self.size = size
        self.enter = nn.Sequential(nn.Conv2d(own, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.attend = None if deepest else nn.Conv2d(2 * middle, 2, 1)
        self.leave = nn.Sequential(nn.Conv2d(middle, other, 3, padding=1, bias=False), nn.BatchNorm2d(other))
        for conv in (self.enter[0], self.leave[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, own, h, w] -> [B, other, H, W] to compare, and [B, middle, H, W] for the next."""
        x = self.enter(x)
        if self.attend is not None:
            deeper = F.interpolate(deeper, x.shape[-2:])  # nearest
            shares = torch.sigmoid(self.attend(torch.cat([x, deeper], dim=1)))
            x = x * shares[:, :1] + deeper * shares[:, 1:]
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size)
        return self.leave(x), x


class ReviewKD(nn.Module):
    """The registered loss ``reviewkd``."""

    needs = frozenset({"taps"})

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.pairs = pairs(shapes)[::-1]  # from the deepest on
        own = [map_shape(shapes.student, pair[0]) for pair in self.pairs]
        other = [map_shape(shapes.teacher, pair[1]) for pair in self.pairs]
        middle = min(WIDEST, own[0][0])
        self.fusions = nn.ModuleList(
            Fusion(s[0], middle, t[0], t[1:], deepest=i == 0) for i, (s, t) in enumerate(zip(own, other, strict=True))
        )
        self.min_batch = 2 if (1, 1) in [shape[1:] for shape in own + other] else 1  # one value has no variance

    @classmethod
    def build(cls, shapes: Shapes, options: ReviewKDOptions) -> Self:
        return cls(shapes)

    taps = staticmethod(taps)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        fused, wanted, deeper = [], [], None
        for pair, fusion in zip(self.pairs, self.fusions, strict=True):
            own, other = map(as_map, features(student, teacher, pair))
            compared, deeper = fusion(own, deeper)
            fused.append(compared)
            wanted.append(other)
        return hcl(fused, wanted)
