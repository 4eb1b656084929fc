"""RKD: distances and angles between samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import Shapes

from .options import RKDOptions
from .paired import Paired
from .pairs import Pair, pairs
from .vectors import differences, unit

EPS = 1e-12


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
) -> Tensor:
    """``distance_weight`` D + ``angle_weight`` A, each a mean of Huber losses (delta 1) over all B^2 and B^3 relations.

    D compares the distances of two samples divided by the mean distance, A the cosines of the angles at a sample
    between two others. Two equal samples have a distance of 1e-6 and no direction; neither gives a gradient.

    Park et al., Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068), section 3.2.

    Args:
        student: [B, ...], floating; B from 2.
        teacher: [B, ...], of any other shape; it gets no gradient.
        distance_weight: of D.
        angle_weight: of A.
        squared: whether distances are squared.

    The angles take B^3 numbers, and the differences B^2 times the width of a feature.
    """
    own, other = (differences(side.flatten(1)) for side in (student, teacher.detach()))
    distance = F.smooth_l1_loss(_distances(own, squared), _distances(other, squared))
    return distance_weight * distance + angle_weight * F.smooth_l1_loss(_cosines(own), _cosines(other))


def _distances(apart: Tensor, squared: bool) -> Tensor:
    """[B, B, D] -> [B, B], of mean 1 off the diagonal, which is 0."""
    square = apart.square().sum(-1).clamp_min(EPS)
    itself = torch.eye(len(square), dtype=torch.bool, device=square.device)
    found = (square if squared else square.sqrt()).masked_fill(itself, 0)
    return found * (len(found) * (len(found) - 1)) / found.sum()


def _cosines(apart: Tensor) -> Tensor:
    """[B, B, D] -> [B, B, B]: at [i, j, k] the angle at i between j and k."""
    towards = unit(apart)
    return towards @ towards.mT


class RKD(Paired):
    """The registered loss ``rkd``."""

    mean_over_batch = False
    min_batch = 2

    def __init__(self, found: Sequence[Pair], options: RKDOptions) -> None:
        super().__init__(found)
        self.distance_weight, self.angle_weight = options.distance_weight, options.angle_weight
        self.squared = options.squared

    @classmethod
    def build(cls, shapes: Shapes, options: RKDOptions) -> Self:
        return cls(pairs(shapes), options)

    def compare(self, own: Tensor, other: Tensor) -> Tensor:
        weights = {"distance_weight": self.distance_weight, "angle_weight": self.angle_weight}
        return rkd_loss(own, other, squared=self.squared, **weights)
