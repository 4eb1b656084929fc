"""Controller ``plateau``: distillation ends when the student no longer gets better.

Prechelt, Early Stopping - But When?, in Neural Networks: Tricks of the Trade, 1998, compares rules that end a training
by its validation curve. Here such a rule ends the teacher's part alone: the student goes on with labels. It needs no
control, and cannot tell a student that is held back from one that has learned what it can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import kdcore

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.controller("plateau", Plateau, about="stops distillation when the student no longer gets better")


class Plateau:
    """Counts the ticks since the student's accuracy on the monitor split was last better than its best.

    The best moves only by a step above ``min_delta``, so that small steps add up until they count.
    """

    class Options(kdcore.Options):
        """How long to wait, and for how much."""

        patience: int = kdcore.Field(3, ge=1, description="how many epochs in a row may be no better, from 1")
        min_delta: float = kdcore.Field(0.0, ge=0, lt=1, description="a share that is no gain yet, such as 0.001")
        label_weight: float = kdcore.Field(1.0, gt=0, description="the weight of the label terms after the stop")

    needs = frozenset({"accuracy"})

    def __init__(self, options: Options) -> None:
        self.options = options
        self.best: float | None = None
        self.count, self.stopped = 0, False

    @staticmethod
    def prepare(stage: kdcore.Stage, run: kdcore.RunView, options: Options) -> kdcore.Stage:
        """Refuses a student that has nothing to go on with."""
        if all(term.source is not None for term in stage.members["student"].terms):
            fix = 'Add [[objective]] loss = "cross_entropy"; its weight may be 0.'
            raise kdcore.PlanError("no term on labels to go on with", where="objective", fix=fix)
        return stage

    def decide(self, view: kdcore.TickView) -> Iterable[kdcore.Decision]:
        now = view.now("student")
        if self.stopped or now is None:
            return []
        if self.best is None or now > self.best + self.options.min_delta:
            self.best, self.count = now, 0
            return []
        self.count += 1
        if self.count < self.options.patience:
            return []
        self.stopped = True
        times = f"{self.count} times in a row " if self.count > 1 else ""
        margin = f" by more than {self.options.min_delta:.2%}" if self.options.min_delta else ""
        reason = f"{times}the student was not above its best of {self.best:.2%}{margin} (now {now:.2%})"
        return kdcore.labels_alone(view, "student", reason, self.options.label_weight)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "count": self.count, "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.count, self.stopped = state["best"], state["count"], state["stopped"]
