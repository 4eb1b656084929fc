"""AT: where a stage looks, as a map of its mean activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor
from torch.linalg import vector_norm

from kdcore import Shapes

from .maps import map_pairs, match
from .options import ATOptions, Variant
from .paired import Paired
from .pairs import Pair
from .vectors import unit


def at_loss(student: Tensor, teacher: Tensor, *, p: int = 2, variant: Variant = "public") -> Tensor:
    """The difference of attention maps.

    With Q the mean of f^p over the channels, flattened and divided by its length: the mean of (Q_s - Q_t)^2 over
    samples and places; in the paper's form 1/2 |Q_s - Q_t|, of |f|^p, the mean over samples.

    Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017 (arXiv 1612.03928), equation 2.

    Args:
        student: [B, C, H, W], floating.
        teacher: [B, C', H', W']; the larger map is pooled to the smaller; it gets no gradient.
        p: the power, from 1.
        variant: "public" or "paper".
    """
    own, other = match(student, teacher.detach())
    if variant == "paper":
        return vector_norm(_attention(own.abs(), p) - _attention(other.abs(), p), dim=1).mean() / 2
    return (_attention(own, p) - _attention(other, p)).square().mean()


def _attention(maps: Tensor, p: int) -> Tensor:
    """[B, C, H, W] -> [B, H W], of length 1."""
    return unit(maps.pow(p).mean(1).flatten(1))


class AT(Paired):
    """The registered loss ``at``."""

    def __init__(self, found: Sequence[Pair], options: ATOptions) -> None:
        super().__init__(found)
        self.p, self.variant = options.p, options.variant

    @classmethod
    def build(cls, shapes: Shapes, options: ATOptions) -> Self:
        return cls(map_pairs(shapes), options)

    def compare(self, own: Tensor, other: Tensor) -> Tensor:
        return at_loss(own, other, p=self.p, variant=self.variant)
