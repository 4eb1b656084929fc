"""Strategy ``assistants``: a given chain of assistants between teacher and student.

Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, AAAI 2020. Each model of the chain is distilled
from the one before it; the first is trained on labels alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import kdcore

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.strategy("assistants", Assistants, about="a given chain of assistants")


class Assistants:
    """teacher -> assistants[0] -> assistants[1] -> ... -> student."""

    class Options(kdcore.Options):
        """The chain between teacher and student."""

        example: ClassVar[Mapping[str, Any]] = {"assistants": [{"model": "mlp", "size": 2}]}

        assistants: list[dict[str, Any]] = kdcore.Field(
            min_length=1, description='the models between teacher and student, e.g. [{ model = "cnn", size = 2 }]'
        )

    def plan(self, run: kdcore.RunView, options: Options) -> kdcore.Plan:
        first = run.label_only("teacher", run.teacher)
        stages, teacher = [first], first["teacher"]
        for model in [*map(run.model, options.assistants), run.student]:
            stages.append(run.distilled(model, teacher))
            teacher = stages[-1]["student"]
        yield stages
        return kdcore.Outcome(teacher, first["teacher"])
