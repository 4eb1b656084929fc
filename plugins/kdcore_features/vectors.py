"""Directions and distances of vectors, with finite gradients where vectors are zero or alike."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 16
"""How many units in the last place a zero may be off: features of one image at two places of a batch differ so."""


def unit(vectors: Tensor, eps: float = 0.0) -> Tensor:
    """Vectors [..., D] divided by their length plus ``eps``.

    A vector that is zero, up to rounding beside the longest one, has no direction: it becomes zero and gets no
    gradient. The gradient of v / |v| grows as 1 / |v|, to 1e12 where lengths are only held above 1e-12.
    """
    square = vectors.square().sum(-1, keepdim=True)
    none = square <= (ROUNDING * torch.finfo(square.dtype).eps) ** 2 * square.detach().amax()
    return (vectors / (square.masked_fill(none, 1).sqrt() + eps)).masked_fill(none, 0)


def differences(rows: Tensor) -> Tensor:
    """[B, D] -> [B, B, D], x_j - x_i at [i, j]: exactly zero for equal rows, which a Gram matrix rounds away."""
    return rows[None] - rows[:, None]
