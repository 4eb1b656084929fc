"""Activation boundaries: which neurons are active, with a margin (Heo et al., AAAI 2019, arXiv:1811.03233)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .adapters import Adapted, Shape, adapters, to_smaller
from .options import ABOptions
from .pairs import Pair, pairs, total

SCALE = 3 / 1000  # of the authors' code


def ab_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, margin: float = 1.0) -> Tensor:
    """The sum over stages i of 2^(i-n+1) 0.003 / B times what student neurons miss of the margin on the teacher's side.

    A neuron s misses m - s where the teacher's is active (t > 0) and s + m where it is not, if that is above 0; misses
    are squared and summed over all elements.

    Args:
        student: n pre-activations [B, ...], shallow to deep.
        teacher: of the same shapes.
        margin: m.
    """
    last = len(student) - 1
    parts = [2.0 ** (i - last) * _missed(s, t, margin) for i, (s, t) in enumerate(zip(student, teacher, strict=True))]
    return SCALE * total(parts)


def _missed(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    gap = torch.where(teacher > 0, margin - student, margin + student)
    return gap.relu().square().sum() / len(student)


def connector(student: Shape, teacher: Shape) -> nn.Module:
    """The authors' connector: a 1x1 convolution without bias and a batch norm, at the smaller size."""
    convolution = nn.Conv2d(student[0], teacher[0], 1, bias=False)
    return nn.Sequential(to_smaller(student, teacher), convolution, nn.BatchNorm2d(teacher[0]))


class AB(Adapted):
    """The registered loss ``ab``, of pre-activations through connectors."""

    def __init__(self, found: tuple[Pair, ...], connectors: nn.ModuleList, margin: float) -> None:
        super().__init__(found, connectors)
        self.margin = margin

    @classmethod
    def build(cls, shapes: Shapes, options: ABOptions) -> Self:
        found = pairs(shapes)
        return cls(found, adapters(shapes, found, options, connector), options.margin)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over the batch, 0-d, in float32 or float64."""
        both = self.compared(student, teacher)
        return ab_loss([own for own, _ in both], [other for _, other in both], margin=self.margin)
