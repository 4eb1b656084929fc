"""NST: the distribution of a stage's channels over the image."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from kdcore import Shapes

from .maps import map_pairs, match
from .paired import Paired
from .vectors import unit


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared maximum mean discrepancy between the channels of two maps, under the kernel k(a, b) = (a . b)^2.

    A channel is flattened and divided by its length; mean k(t, t) + mean k(s, s) - 2 mean k(s, t), over samples and
    pairs of channels.

    Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017 (arXiv 1707.01219).

    Args:
        student: [B, C, H, W], floating.
        teacher: [B, C', H', W']; the larger map is pooled to the smaller; it gets no gradient.
    """
    own, other = (unit(maps.flatten(2)) for maps in match(student, teacher.detach()))
    return _kernel(other, other) + _kernel(own, own) - 2 * _kernel(own, other)


def _kernel(one: Tensor, two: Tensor) -> Tensor:
    """[B, C, H W], [B, C', H W] -> the mean over B, C and C'.

    Of few places it goes over pairs of places: pairs of 2,048 channels take 4 GB at a batch of 256.
    """
    pairs_of_channels, places = one.shape[1] * two.shape[1], one.shape[2]
    if places**2 < pairs_of_channels:
        return ((one.mT @ one) * (two.mT @ two)).sum((1, 2)).mean() / pairs_of_channels
    return (one @ two.mT).square().mean()


class NST(Paired):
    """The registered loss ``nst``."""

    @classmethod
    def build(cls, shapes: Shapes, options: Any) -> Self:
        return cls(map_pairs(shapes))

    def compare(self, own: Tensor, other: Tensor) -> Tensor:
        return nst_loss(own, other)
