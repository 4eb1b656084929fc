"""What losses share that compare features pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .pairs import Pair, features, pairs, taps


class Paired(nn.Module):
    """A sum over corresponding taps; a subclass compares two features."""

    needs = frozenset({"taps"})
    taps = staticmethod(taps)

    def __init__(self, found: Sequence[Pair]) -> None:
        super().__init__()
        self.pairs = tuple(found)

    @classmethod
    def build(cls, shapes: Shapes, options: Any) -> Self:
        return cls(pairs(shapes))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return torch.stack([self.compare(*features(student, teacher, pair)) for pair in self.pairs]).sum()

    def compare(self, own: Tensor, other: Tensor) -> Tensor:
        """The loss for the features [B, ...] of one tap of the learner and of its source."""
        raise NotImplementedError
