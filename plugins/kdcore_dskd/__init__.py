"""Controller ``dskd``: dynamic stop of distillation by a control student.

Si et al., Multi-assistant Dynamic Setting Method for Knowledge Distillation, Computer Science 52(5), 2025, algorithm 1,
lines 11-23: a control of the student's architecture, with the same initial weights and the same batches in the same
order, learns from labels alone. When the control was at least as good as the student ``patience`` times, measured on
the monitor split after each epoch, the student goes on with labels alone.

The control does not depend on the teacher, so it is an ordinary label-only stage: trained once, shared by every stage
and run that needs it, and read here by its curve. ``mode = "side-by-side"`` trains it in the same stage, as printed;
weights and curve are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import kdcore

KDCORE_HOOKS = 1
CONTROL = "control"


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.controller("dskd", DynamicStop, about="stops distillation when a label-only control is as good")


class DynamicStop:
    """Counts the ticks at which the student was not above the control."""

    class Options(kdcore.Options):
        """K of algorithm 1, and how the control is trained."""

        patience: int = kdcore.Field(3, ge=1, description="how often the control may be as good, from 1")
        consecutive: bool = kdcore.Field(False, description="true if only a row of ticks counts")
        mode: Literal["shared", "side-by-side"] = kdcore.Field("shared", description='"shared" or "side-by-side"')
        label_weight: float = kdcore.Field(1.0, gt=0, description="the weight of the label terms after the stop")

    needs = frozenset({"accuracy"})

    def __init__(self, options: Options) -> None:
        self.options = options
        self.count, self.stopped = 0, False

    @staticmethod
    def prepare(stage: kdcore.Stage, run: kdcore.RunView, options: Options) -> kdcore.Stage:
        """Gives a distilled stage its control."""
        student = stage.members["student"]
        if all(term.source is not None for term in student.terms):
            fix = 'Add [[objective]] loss = "cross_entropy"; its weight may be 0.'
            raise kdcore.PlanError("no term on labels to go on with", where="objective", fix=fix)
        control = run.label_only(CONTROL, student.model)
        if options.mode == "shared":
            return dataclasses.replace(stage, uses={**stage.uses, CONTROL: control[CONTROL]})
        return dataclasses.replace(stage, members={**stage.members, CONTROL: control.members[CONTROL]})

    def decide(self, view: kdcore.TickView) -> Iterable[kdcore.Decision]:
        student, control = view.now("student"), view.now(CONTROL)
        if self.stopped or student is None or control is None:
            return []
        self.count = self.count + 1 if student <= control else 0 if self.options.consecutive else self.count
        if self.count < self.options.patience:
            return []
        self.stopped = True
        times = "once" if self.count == 1 else f"{self.count} times"
        reason = f"the control was as good {times} (now {control:.2%}, the student {student:.2%})"
        drop = [kdcore.Drop(CONTROL, reason)] if CONTROL in view.curves else []
        return [*kdcore.labels_alone(view, "student", reason, self.options.label_weight), *drop]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.stopped = state["count"], state["stopped"]
