"""Controller ``earlystop``: distillation ends after a fixed share of the epochs.

Cho & Hariharan, On the Efficacy of Knowledge Distillation, ICCV 2019: stopping early helps where the teacher is much
larger than the student; a third to a quarter of the epochs is customary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import kdcore

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.controller("earlystop", EarlyStop, about="stops distillation after a share of the epochs")


class EarlyStop:
    """Puts the student on labels alone once ``fraction`` of the ticks are over."""

    class Options(kdcore.Options):
        """When to stop."""

        fraction: float = kdcore.Field(1 / 3, gt=0, lt=1, description="a share of the epochs, e.g. 0.33")
        label_weight: float = kdcore.Field(1.0, gt=0, description="the weight of the label terms after the stop")

    needs: frozenset[str] = frozenset()

    def __init__(self, options: Options) -> None:
        self.options = options
        self.stopped = False

    @staticmethod
    def prepare(stage: kdcore.Stage, run: kdcore.RunView, options: Options) -> kdcore.Stage:
        """Refuses a student that has nothing to go on with."""
        if all(term.source is not None for term in stage.members["student"].terms):
            fix = 'Add [[objective]] loss = "cross_entropy"; its weight may be 0.'
            raise kdcore.PlanError("no term on labels to go on with", where="objective", fix=fix)
        return stage

    def decide(self, view: kdcore.TickView) -> Iterable[kdcore.Decision]:
        if self.stopped or view.tick / view.length < self.options.fraction:  # 0.28 * 25 is above 7
            return []
        self.stopped = True
        reason = f"{view.tick} of {view.length} epochs are over"
        return kdcore.labels_alone(view, "student", reason, self.options.label_weight)

    def state_dict(self) -> dict[str, Any]:
        return {"stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stopped = state["stopped"]
