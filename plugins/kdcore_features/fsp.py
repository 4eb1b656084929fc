"""Flow of solution procedure: Gram matrices of neighbouring stages (Yim et al., CVPR 2017, eq. 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import Batch, Outputs, PlanError, Shapes

from .maps import map_pairs, match
from .options import FSPOptions
from .pairs import Pair, features, taps, total


def fsp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over neighbouring stages of the mean squared difference of their flows.

    Args:
        student: n >= 2 maps [B, C_i, H_i, W_i], shallow to deep.
        teacher: maps of the same C_i; sizes may differ.
    """
    flows = zip(pairwise(student), pairwise(teacher), strict=True)
    return total([F.mse_loss(flow(*own), flow(*other)) for own, other in flows])


def flow(lower: Tensor, upper: Tensor) -> Tensor:
    """G[b, u, l] = mean over positions of upper_u lower_l, the larger map averaged to the smaller one's size.

    Args:
        lower: [B, L, H, W].
        upper: [B, U, h, w].
    """
    lower, upper = (x.flatten(2) for x in match(lower, upper))
    return torch.bmm(upper, lower.transpose(1, 2)) / lower.shape[2]


class FSP(nn.Module):
    """The registered loss ``fsp``, of the stem, where a model has one, and every stage."""

    needs: frozenset[str] = frozenset({"taps"})
    taps = staticmethod(taps)

    def __init__(self, found: tuple[Pair, ...]) -> None:
        super().__init__()
        self.pairs = found

    @classmethod
    def build(cls, shapes: Shapes, options: FSPOptions) -> Self:
        found = map_pairs(shapes, least=2)
        for own, other in found:
            widths = shapes.student[own][0], shapes.teacher[other][0]
            if widths[0] != widths[1]:
                what = f"{own!r} has {widths[0]} channels, the teacher's {other!r} {widths[1]}; flows want equal ones"
                fix = "Name taps of equal width, or use a loss with adapters, such as fitnet or vid."
                raise PlanError(what, where="fsp", fix=fix)
        return cls(found)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over the batch, 0-d, in float32 or float64."""
        own, other = zip(*(features(student, teacher, pair) for pair in self.pairs), strict=True)
        return fsp_loss(own, other)
