"""IRG: samples as vertices of a graph, their distances as its edges, and how both change from stage to stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .maps import averages
from .options import IRGOptions
from .pairs import Pair, features, pairs, taps
from .vectors import differences

EPS = 1e-12


def irg_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    logits: tuple[Tensor, Tensor],
    *,
    vertex: float = 0.1,
    edge: float = 5.0,
    transformation: float = 5.0,
) -> Tensor:
    """``vertex`` V + ``edge`` E + ``transformation`` T, each a mean of squared differences of student and teacher.

    V compares the logits, the one feature that has one width on both sides; E the squared distances between samples at
    a stage, divided by the largest; T how these change from a stage to the next, and how far each sample moves there,
    squared and divided by the farthest. E is the mean over the stages, T over the steps between them. Maps are averaged
    over the image, tokens over their number; where stages have different widths, channels are averaged to the smaller.

    Liu et al., Knowledge Distillation via Instance Relationship Graph, CVPR 2019. The weights are those
    of the public PyTorch code; its authors' own is for Caffe.

    Args:
        student: features of the stages, shallow to deep, each [B, C], [B, C, H, W] or tokens [B, N, C],
            floating.
        teacher: as many features, of any other shapes; they get no gradient.
        logits: of the student and of the teacher, [B, classes] each.
        vertex: weight of V.
        edge: weight of E.
        transformation: weight of T.
    """
    own, other = [_vectors(tap) for tap in student], [_vectors(tap).detach() for tap in teacher]
    edges = list(zip(map(_edges, own), map(_edges, other), strict=True))
    found = vertex * F.mse_loss(logits[0], logits[1].detach()) + edge * _mean(edges)
    if len(edges) < 2:
        return found
    moves = list(zip(_moves(own), _moves(other), strict=True))
    changes = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(edges)]
    return found + transformation * (_mean(moves) + _mean(changes))


def _vectors(tap: Tensor) -> Tensor:
    """[B, C], [B, C, H, W] or [B, N, C] -> [B, C]."""
    if tap.ndim == 4:
        return tap.mean((2, 3))
    return tap.mean(1) if tap.ndim == 3 else tap


def _edges(rows: Tensor) -> Tensor:
    """[B, C] -> [B, B], at most 1; all 0 where all rows are equal."""
    square = differences(rows).square().sum(-1)
    return square / (square.amax() + EPS)


def _moves(stages: Sequence[Tensor]) -> list[Tensor]:
    """From each stage to the next one: [B], at most 1."""
    found = []
    for before, after in pairwise(stages):
        width = min(before.shape[1], after.shape[1])
        one, two = (rows @ averages(rows.shape[1], width, rows).T for rows in (before, after))
        square = (two - one).square().sum(-1)
        found.append(square / (square.amax() + EPS))
    return found


def _mean(sides: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([F.mse_loss(own, other) for own, other in sides]).mean()


class IRG(nn.Module):
    """The registered loss ``irg``."""

    needs = frozenset({"logits", "taps"})
    taps = staticmethod(taps)
    shift_invariant = False
    mean_over_batch = False

    def __init__(self, found: Sequence[Pair], options: IRGOptions) -> None:
        super().__init__()
        self.pairs = tuple(found)
        self.vertex, self.edge, self.transformation = options.vertex, options.edge, options.transformation

    @classmethod
    def build(cls, shapes: Shapes, options: IRGOptions) -> Self:
        return cls(pairs(shapes), options)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        own, other = zip(*(features(student, teacher, pair) for pair in self.pairs), strict=True)
        logits = student.logits.to(own[0].dtype), teacher.logits.to(own[0].dtype)
        weights = {"vertex": self.vertex, "edge": self.edge, "transformation": self.transformation}
        return irg_loss(own, other, logits, **weights)
