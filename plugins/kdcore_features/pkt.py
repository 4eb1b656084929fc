"""PKT: with what probability a sample has each other one as its neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from kdcore import Shapes

from .options import PKTOptions, Variant
from .paired import Paired
from .pairs import Pair, pairs
from .vectors import unit

EPS = 1e-7


def pkt_loss(student: Tensor, teacher: Tensor, *, variant: Variant = "public") -> Tensor:
    """The divergence of the neighbours' probabilities P, the rows of (1 + cosine) / 2 divided by their sums.

    The mean of P_t log(P_t / P_s) over all B^2 entries, a sample itself included; in the paper's form a sample is no
    neighbour of itself, and entries are summed over a row, with the mean over rows. Probabilities in the logarithm and
    lengths in the cosine are raised by 1e-7.

    Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018
    (arXiv 1803.10837), section 3.

    Args:
        student: [B, ...], floating.
        teacher: [B, ...], of any other shape; it gets no gradient.
        variant: "public" or "paper".
    """
    own, other = _chances(student, variant), _chances(teacher.detach(), variant)
    # log1p of the difference: of nearly equal probabilities the logarithm of the ratio keeps few digits in float32
    rows = (other * ((other - own) / (own + EPS)).log1p()).sum(1)
    return rows.mean() if variant == "paper" else rows.mean() / len(rows)


def _chances(features: Tensor, variant: Variant) -> Tensor:
    """[B, ...] -> [B, B], of rows that sum to 1."""
    rows = unit(features.flatten(1), EPS)
    near = (rows @ rows.T + 1) / 2
    if variant == "paper":
        near = near.masked_fill(torch.eye(len(near), dtype=torch.bool, device=near.device), 0)
    return near / near.sum(1, keepdim=True).clamp_min(EPS)


class PKT(Paired):
    """The registered loss ``pkt``."""

    mean_over_batch = False
    min_batch = 2

    def __init__(self, found: Sequence[Pair], options: PKTOptions) -> None:
        super().__init__(found)
        self.variant = options.variant

    @classmethod
    def build(cls, shapes: Shapes, options: PKTOptions) -> Self:
        return cls(pairs(shapes), options)

    def compare(self, own: Tensor, other: Tensor) -> Tensor:
        return pkt_loss(own, other, variant=self.variant)
