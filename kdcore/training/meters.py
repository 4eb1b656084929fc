"""Means of device scalars without a sync between two log points."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import NumericError
from .world import ALONE, World


@dataclass
class Meters:
    """Collects 0-d tensors by name and moves them to the host together.

    Sums grow one value after the other in the order of steps, so they do not depend on when ``flush`` is called: a
    resumed stage shows the same curve as an uninterrupted one.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    pending: list[tuple[str, int, Tensor, float]] = field(default_factory=list)

    def record(self, name: str, step: int, value: Tensor, share: float = 1.0) -> None:
        """Remembers ``value`` (0-d, any float dtype) under ``member.term``; costs no copy. ``share`` is what it counts:
        less than 1 for a piece of a batch.
        """
        self.pending.append((name, step, value.detach(), share))

    def flush(self, stage: str, diverge: Callable[[str, NumericError], None], world: World = ALONE) -> dict[str, float]:
        """Moves what is pending to the host, one copy; returns the means since the last flush, over all ranks.

        A value that is not finite is left out, and told to ``diverge(member, error)``, which may raise the error: it
        names stage, step, member and term.
        """
        if not self.pending:
            return {}
        values = torch.stack([value.double() for _, _, value, _ in self.pending])
        shares = [share for *_, share in self.pending]
        if world.size > 1:
            values, shares = _over_ranks(values, shares, world)
        host = values.tolist()  # the only sync until the next
        interval = Meters()
        for (name, step, _, _), value, share in zip(self.pending, host, shares, strict=True):
            if not math.isfinite(value):
                diverge(name.partition(".")[0], _not_finite(stage, name, step, value))
                continue
            for meters in (self, interval):
                meters.sums[name] = meters.sums.get(name, 0.0) + share * value
                meters.counts[name] = meters.counts.get(name, 0) + share
        self.pending.clear()
        return interval.take()

    def take(self) -> dict[str, float]:
        """The means since the last call, and a fresh start."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums.clear()
        self.counts.clear()
        return means


def _over_ranks(values: Tensor, shares: list[float], world: World) -> tuple[Tensor, list[float]]:
    """Means over ranks by their shares, and the sums of those."""
    weights = values.new_tensor(shares)
    values, weights = world.sum(torch.stack([values * weights, weights]))
    return values / weights, weights.tolist()


def _not_finite(stage: str, name: str, step: int, value: float) -> NumericError:
    member, _, term = name.partition(".")
    return NumericError(
        f"{term} is {value}",
        where=f"stage {stage!r}, step {step}, member {member!r}, term {term!r}",
        fix="Lower train.lr, set train.clip, or check the inputs; the last checkpoint is sound.",
    )
