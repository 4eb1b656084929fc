"""Singular vectors of neighbouring stages (Lee, Kim and Song, ECCV 2018, arXiv:1807.06819, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import Batch, Outputs, PlanError, Shapes

from .maps import map_pairs
from .options import KDSVDOptions
from .pairs import Pair, features, taps, total

Unfold: TypeAlias = Literal["channels", "width"]
SPARE = 3  # more vectors of the student, from which the teacher's are matched


def kdsvd_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, vectors: int = 1, unfold: Unfold = "channels"
) -> Tensor:
    """The sum over neighbouring stages of the squared difference of their vectors' radial functions, over B.

    Args:
        student: n >= 2 maps [B, C, H, W], shallow to deep.
        teacher: maps of the same C ("channels") or of the same W ("width").
        vectors: how many right singular vectors of the teacher count in each stage.
        unfold: "channels" takes a map as [H W, C], so that vectors are directions among channels; "width" as [C H, W].
    """
    kept = [leading(other, vectors, unfold) for other in teacher]
    return kdsvd_to([v for v, _ in kept], [s for _, s in kept], student, unfold)


def kdsvd_to(
    vectors: Sequence[Tensor], strengths: Sequence[Tensor], student: Sequence[Tensor], unfold: Unfold = "channels"
) -> Tensor:
    """:func:`kdsvd_loss` to the teacher's vectors [B, L, k] and strengths [B, 1, k], whose signs it depends on."""
    own = [aligned(right_vectors(s, v.shape[2] + SPARE, unfold)[0], v) for s, v in zip(student, vectors, strict=True)]
    found, wanted = _weighted(own, strengths), _weighted(vectors, strengths)
    parts = [(radial(*f) - radial(*w)).square().sum() for f, w in zip(pairwise(found), pairwise(wanted), strict=True)]
    return total(parts) / len(student[0])


def leading(feature: Tensor, count: int, unfold: Unfold) -> tuple[Tensor, Tensor]:
    """The teacher's side: right singular vectors [B, L, count], and their values [B, 1, count] at unit length.

    A vector has two signs, and the loss depends on which is taken. Here its entry of largest magnitude is positive: so
    machines, devices and libraries agree.
    """
    vectors, values = right_vectors(feature, count, unfold)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype), F.normalize(values, dim=1)[:, None]


def right_vectors(feature: Tensor, count: int, unfold: Unfold) -> tuple[Tensor, Tensor]:
    """The first right singular vectors [B, L, n] of an unfolded map M, and their values [B, n].

    There are n = ``count`` of them, or as many as M has. The gradient is that of a singular vector, by perturbation:
    with A = M'M, v_j moves by the sum over i of v_i (v_i' dA v_j) / (s_j^2 - s_i^2). Where two values are equal in
    floating point the vectors between them are arbitrary, and that direction counts as 0; torch's own derivative is NaN
    there, e.g. for two channels that are zero.
    """
    matrix = feature.flatten(2).transpose(1, 2) if unfold == "channels" else feature.flatten(1, 2)
    with torch.no_grad():
        _, values, basis = torch.linalg.svd(matrix, full_matrices=False)
        basis = basis.transpose(1, 2)
        chosen = basis[:, :, :count]
    image = matrix.transpose(1, 2) @ (matrix @ chosen)
    change = image - image.detach()  # 0, but with the gradient of dA v_j
    inner = basis.transpose(1, 2) @ change
    moved = basis @ (_inverse_gaps(values, values[:, :count]) * inner)
    if basis.shape[1] > basis.shape[2]:  # directions outside of the basis have the value 0
        outside = change - basis @ inner
        moved = moved + _inverse_gaps(values.new_zeros(len(values), 1), values[:, :count]) * outside
    return chosen + moved, values[:, :count]


def _inverse_gaps(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, R, N]: 1 / (column^2 - row^2), and 0 where that is nothing but rounding."""
    rows, columns = rows[:, :, None], columns[:, None, :]
    gaps = (columns - rows) * (columns + rows)
    largest = columns[:, :, :1].square()
    apart = gaps.abs() > 10 * torch.finfo(gaps.dtype).eps * largest
    return torch.where(apart, torch.where(apart, gaps, 1.0).reciprocal(), 0.0)


def aligned(own: Tensor, wanted: Tensor) -> Tensor:
    """For each of ``wanted`` [B, L, k] the nearest of ``own`` [B, L, n] by its absolute cosine, with that sign."""
    cosines = own.detach().transpose(1, 2) @ wanted
    best = cosines.abs().argmax(1, keepdim=True)
    signs = torch.where(cosines.gather(1, best) < 0, -1.0, 1.0).to(own.dtype)
    return own @ torch.zeros_like(cosines).scatter(1, best, signs)  # a gather's gradient is not deterministic on a GPU


def radial(lower: Tensor, upper: Tensor) -> Tensor:
    """exp(-(upper_i - lower_j)^2 / 8) by vector: [B, L, k], [B, U, k] -> [B, U, L, k]."""
    return torch.exp(-(upper[:, :, None] - lower[:, None]).square() / 8)


def _weighted(vectors: Sequence[Tensor], strengths: Sequence[Tensor]) -> list[Tensor]:
    return [v * s for v, s in zip(vectors, strengths, strict=True)]


class KDSVD(nn.Module):
    """The registered loss ``kdsvd``, of every stage."""

    needs: frozenset[str] = frozenset({"taps"})
    taps = staticmethod(taps)

    def __init__(self, found: tuple[Pair, ...], vectors: int, unfold: Unfold) -> None:
        super().__init__()
        self.pairs, self.vectors, self.unfold = found, vectors, unfold

    @classmethod
    def build(cls, shapes: Shapes, options: KDSVDOptions) -> Self:
        found, axis = map_pairs(shapes, least=2), 0 if options.unfold == "channels" else 2
        for own, other in found:
            sizes = shapes.student[own][axis], shapes.teacher[other][axis]
            if sizes[0] != sizes[1]:
                what = f"{options.unfold} of {own!r} and the teacher's {other!r} are {sizes[0]} and {sizes[1]}"
                another = "width" if axis == 0 else "channels"
                fix = f'They have to be equal: name other taps, or write unfold = "{another}".'
                raise PlanError(what, where="kdsvd", fix=fix)
        return cls(found, options.vectors, options.unfold)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over the batch, 0-d, in float32 or float64."""
        own, other = zip(*(features(student, teacher, pair) for pair in self.pairs), strict=True)
        return kdsvd_loss(own, other, vectors=self.vectors, unfold=self.unfold)
