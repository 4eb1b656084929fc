"""Controller ``gradient``: distillation ends when teacher and labels pull the student apart.

The rule is this project's own. Its idea is that of gradient conflict: two losses of one model conflict where the
cosine between their gradients is negative (Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020), and an
auxiliary loss is worth following only while it is not (Du et al., Adapting Auxiliary Losses Using Gradient Similarity,
2018). The gradients here are those at the student's logits, on one fixed batch of the monitor split; every tick
measures them anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import kdcore

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.controller("gradient", Gradient, about="stops distillation when its gradient and that of labels conflict")


class Gradient:
    """Counts the ticks in a row at which the cosine was below ``bound``.

    In a row, so that under a patience above 1 a conflict that passes, or one odd measurement, ends nothing. A tick
    without a cosine (no two terms were live, or a term needs more than logits) counts neither way. Many students never
    come to a conflict; the values ``cosine.TERM.TERM`` of their curves show which bound they would meet.
    """

    class Options(kdcore.Options):
        """What a conflict is, and how long it may last."""

        bound: float = kdcore.Field(0.0, gt=-1, le=1, description="a cosine, above -1; below it is a conflict")
        patience: int = kdcore.Field(1, ge=1, description="how many conflicts in a row end it, from 1")
        label_weight: float = kdcore.Field(1.0, gt=0, description="the weight of the label terms after the stop")

    needs = frozenset({"grad_cosine"})

    def __init__(self, options: Options) -> None:
        self.options = options
        self.count, self.stopped = 0, False

    @staticmethod
    def prepare(stage: kdcore.Stage, run: kdcore.RunView, options: Options) -> kdcore.Stage:
        """Refuses a student whose gradients can never be compared."""
        live = [term for term in stage.members["student"].terms if _weight(term) != 0]
        for kind, on_labels, loss in (("on labels", True, "cross_entropy"), ("of distillation", False, "kd")):
            if all((term.source is None) != on_labels for term in live):
                fix = f'Add [[objective]] loss = "{loss}", with a weight above 0.'
                raise kdcore.PlanError(f"no term {kind} whose gradient could be compared", where="objective", fix=fix)
        return stage

    def decide(self, view: kdcore.TickView) -> Iterable[kdcore.Decision]:
        cosine = _cosine(view)
        if self.stopped or cosine is None:
            return []
        self.count = self.count + 1 if cosine < self.options.bound else 0
        if self.count < self.options.patience:
            return []
        self.stopped = True
        times = f"{self.count} times in a row " if self.count > 1 else ""
        what = f"the cosine between the gradients of labels and teacher was below {self.options.bound:g}"
        return kdcore.labels_alone(view, "student", f"{times}{what} (now {cosine:.3f})", self.options.label_weight)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.stopped = state["count"], state["stopped"]


def _weight(term: kdcore.Term) -> float:
    return term.weight.value if isinstance(term.weight, kdcore.Schedule) else term.weight


def _cosine(view: kdcore.TickView) -> float | None:
    """Between the first term on labels and the first of distillation that this tick could compare, in their order."""
    knobs = {knob.removesuffix(".source"): value for knob, value in view.knobs.items() if knob.endswith(".source")}
    sources = {term.removeprefix("student."): value for term, value in knobs.items() if term.startswith("student.")}
    pairs = [(a, b) for a, b in combinations(sources, 2) if (sources[a] is None) != (sources[b] is None)]
    found = (view.now("student", f"cosine.{a}.{b}") for a, b in pairs)
    return next((cosine for cosine in found if cosine is not None), None)
