"""FitNets: a student's middle feature, through a regressor, as the teacher's (Romero et al., ICLR 2015, eq. 3)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .adapters import Adapted, Shape, adapters, to_smaller
from .options import FitNetOptions
from .pairs import pairs, total


def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two features of one shape, over all elements."""
    return F.mse_loss(student, teacher)


def regressor(student: Shape, teacher: Shape) -> nn.Module:
    """The regressor of the field's tables: a convolution to the teacher's size, batch norm, ReLU.

    It halves or doubles a map, or else takes the kernel that leaves the teacher's size; where the student's map is
    smaller in another ratio, the teacher's is pooled to it. A bias would be absorbed by the norm.
    """
    norm = {"bn": nn.BatchNorm2d(teacher[0]), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(conv=_resizing(student, teacher), **norm))


def _resizing(student: Shape, teacher: Shape) -> nn.Module:
    before, after, own, other = student[0], teacher[0], student[1:], teacher[1:]
    if own == _doubled(other):
        return nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    if _doubled(own) == other:
        return nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)
    if all(a >= b for a, b in zip(own, other, strict=True)):
        return nn.Conv2d(before, after, (1 + own[0] - other[0], 1 + own[1] - other[1]), bias=False)
    return nn.Sequential(to_smaller(student, teacher), nn.Conv2d(before, after, 1, bias=False))


def _doubled(size: Shape) -> Shape:
    return tuple(2 * side for side in size)


class FitNet(Adapted):
    """The registered loss ``fitnet``: the sum over its taps, by default one."""

    @classmethod
    def build(cls, shapes: Shapes, options: FitNetOptions) -> Self:
        found, public = pairs(shapes), options.variant == "public"
        return cls(found, adapters(shapes, found, options, regressor if public else None))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over the batch, 0-d, in float32 or float64."""
        return total([fitnet_loss(*pair) for pair in self.compared(student, teacher)])
