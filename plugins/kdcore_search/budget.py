"""What a search may cost: recorded costs of what is trained, and predicted ones of what is asked for next."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import kdcore

from .options import Budget


@dataclass
class Ledger:
    """What is spent and what is planned. FLOPs are planned by the estimate, an upper bound, so that their limit holds;
    seconds by the same at the rate seen so far, so that theirs may be overshot by what the rate is wrong by.

    Args:
        budget: the limits.
        estimate: FLOPs of a stage.
        stages: spent or planned.
        flops: spent or planned.
        seconds: spent or planned.
        rate: seconds a FLOP so far; 0 before the first stage.
    """

    budget: Budget
    estimate: Callable[[kdcore.Stage], int]
    stages: int
    flops: int
    seconds: float
    rate: float

    @classmethod
    def after(cls, done: Collection[kdcore.Result], budget: Budget, estimate: Callable[[kdcore.Stage], int]) -> Ledger:
        """The ledger when these are trained."""
        flops, seconds = sum(result.flops for result in done), sum(result.seconds for result in done)
        return cls(budget, estimate, len(done), flops, seconds, seconds / flops if flops else 0.0)

    def take(self, stages: Collection[kdcore.Stage]) -> dict[str, float]:
        """Plans the stages if they fit; else returns the limits that they break, with what would have been spent."""
        estimated = self.budget.seconds is not None or self.budget.tflops is not None
        more = sum(map(self.estimate, stages)) if estimated else 0
        after = replace(
            self, stages=self.stages + len(stages), flops=self.flops + more, seconds=self.seconds + more * self.rate
        )
        broken = {name: total for name, total, limit in after.totals() if total > limit}
        if not broken:
            self.stages, self.flops, self.seconds = after.stages, after.flops, after.seconds
        return broken

    def totals(self) -> list[tuple[str, float, float]]:
        """Name, total and limit of everything that is limited."""
        totals = {"stages": self.stages, "tflops": self.flops / 1e12, "seconds": self.seconds}
        limits = {name: getattr(self.budget, name) for name in totals}
        return [(name, total, limits[name]) for name, total in totals.items() if limits[name] is not None]
