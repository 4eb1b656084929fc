"""CC: how samples correlate with each other, under a Gaussian kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from kdcore import Shapes

from .options import CCOptions
from .paired import Paired
from .pairs import Pair, pairs
from .vectors import unit


def cc_loss(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """The mean of (K_s - K_t)^2 over the B^2 pairs of samples.

    K_ij is the Gaussian kernel exp(-gamma |x_i - x_j|^2) of features of length 1, as its Taylor series up to ``order``:
    exp(-2 gamma) times the sum of (2 gamma)^p / p! (x_i . x_j)^p.

    Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019 (arXiv 1904.01802).

    Args:
        student: [B, ...], floating.
        teacher: [B, ...], of any other shape; it gets no gradient.
        gamma: how fast the kernel falls with the distance.
        order: the highest power, from 1.
    """
    own, other = (_correlations(side, gamma, order) for side in (student, teacher.detach()))
    return (own - other).square().mean()


def _correlations(features: Tensor, gamma: float, order: int) -> Tensor:
    """[B, ...] -> [B, B]."""
    rows = unit(features.flatten(1))
    cosines = rows @ rows.T
    series = torch.ones_like(cosines)
    for p in range(order, 0, -1):
        series = 1 + 2 * gamma / p * cosines * series
    return math.exp(-2 * gamma) * series


class CC(Paired):
    """The registered loss ``cc``."""

    mean_over_batch = False
    min_batch = 2

    def __init__(self, found: Sequence[Pair], options: CCOptions) -> None:
        super().__init__(found)
        self.gamma, self.order = options.gamma, options.order

    @classmethod
    def build(cls, shapes: Shapes, options: CCOptions) -> Self:
        return cls(pairs(shapes), options)

    def compare(self, own: Tensor, other: Tensor) -> Tensor:
        return cc_loss(own, other, gamma=self.gamma, order=self.order)
