"""Means of device scalars without a sync between two log points."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import NumericError


@dataclass
class Meters:
    """Collects 0-d tensors by name and moves them to the host together.

    Sums grow one value after the other in the order of steps, so they do not depend on when ``flush`` is called: a
    resumed stage shows the same curve as an uninterrupted one.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, int, Tensor]] = field(default_factory=list)

    def record(self, name: str, step: int, value: Tensor) -> None:
        """Remembers ``value`` (0-d, any float dtype) under ``member.term``; costs no copy."""
        self.pending.append((name, step, value.detach()))

    def flush(self, stage: str) -> dict[str, float]:
        """Moves what is pending to the host, one copy; returns the means since the last flush.

        Raises:
            NumericError: names stage, step, member and term of the first value that is not finite.
        """
        if not self.pending:
            return {}
        host = torch.stack([value.double() for _, _, value in self.pending]).tolist()  # the only sync until the next
        interval: dict[str, list[float]] = {}
        for (name, step, _), value in zip(self.pending, host, strict=True):
            if not math.isfinite(value):
                raise _not_finite(stage, name, step, value)
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
            interval.setdefault(name, []).append(value)
        self.pending.clear()
        return {name: sum(values) / len(values) for name, values in interval.items()}

    def take(self) -> dict[str, float]:
        """The means since the last call, and a fresh start."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        return means


def _not_finite(stage: str, name: str, step: int, value: float) -> NumericError:
    member, _, term = name.partition(".")
    return NumericError(
        f"{term} is {value}",
        where=f"stage {stage!r}, step {step}, member {member!r}, term {term!r}",
        fix="Lower train.lr, set train.clip, or check the inputs; the last checkpoint is sound.",
    )
