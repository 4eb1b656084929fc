"""What a search may cost: recorded costs of what is trained, and predicted ones of what is asked for next."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import kdcore


class Budget(kdcore.Options):
    """Limits over every distinct stage, the teacher's and the controls' too, whether it was trained now or reused."""

    stages: int | None = kdcore.Field(None, ge=1, description="the most stages, from 1")
    seconds: float | None = kdcore.Field(None, gt=0, description="the most seconds, summed over stages")
    tflops: float | None = kdcore.Field(None, gt=0, description="the most TFLOPs (10^12 of them), summed over stages")


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
    flops: float
    seconds: float
    rate: float

    @classmethod
    def after(cls, done: Collection[kdcore.Result], budget: Budget, estimate: Callable[[kdcore.Stage], int]) -> Ledger:
        """The ledger when these are trained."""
        flops, seconds = sum(result.flops for result in done), sum(result.seconds for result in done)
        return cls(budget, estimate, len(done), flops, seconds, seconds / flops if flops else 0.0)

    def take(self, stages: Collection[kdcore.Stage]) -> str:
        """Plans the stages if they fit; else says which limit they break."""
        told = self.budget.seconds is not None or self.budget.tflops is not None
        flops = sum(map(self.estimate, stages)) if told else 0
        count, total, seconds = self.stages + len(stages), self.flops + flops, self.seconds + flops * self.rate
        limits = {"stages": count, "tflops": total / 1e12, "seconds": seconds}
        for name, value in limits.items():
            limit = getattr(self.budget, name)
            if limit is not None and value > limit:
                return name
        self.stages, self.flops, self.seconds = count, total, seconds
        return ""
