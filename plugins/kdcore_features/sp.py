"""SP: which samples of the batch a stage finds similar."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from kdcore import Shapes

from .options import SPOptions
from .paired import Paired
from .pairs import pairs
from .vectors import unit


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|G_s - G_t|^2 / B^2, where G = F F^T of the flattened features, each row divided by its length.

    Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019 (arXiv 1907.09682), section 3.

    Args:
        student: [B, ...], floating.
        teacher: [B, ...], of any other shape; it gets no gradient.
    """
    return (_similarity(student) - _similarity(teacher.detach())).square().mean()


def _similarity(features: Tensor) -> Tensor:
    """[B, ...] -> [B, B]."""
    rows = features.flatten(1)
    return unit(rows @ rows.T)


class SP(Paired):
    """The registered loss ``sp``, of the deepest pair of taps, or the sum over all of them."""

    mean_over_batch = False
    min_batch = 2

    @classmethod
    def build(cls, shapes: Shapes, options: SPOptions) -> Self:
        found = pairs(shapes)
        return cls(found[-1:] if options.deepest else found)

    def compare(self, own: Tensor, other: Tensor) -> Tensor:
        return sp_loss(own, other)
