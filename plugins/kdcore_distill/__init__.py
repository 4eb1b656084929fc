"""Strategy ``distill``: one teacher, one student (Hinton et al. 2015, with any objective)."""

from __future__ import annotations

import kdcore

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.strategy("distill", Distill, about="one teacher, one student")


class Distill:
    """Trains the teacher on labels, unless its weights are given, and distils it into the student."""

    class Options(kdcore.Options):
        """No options."""

    def plan(self, run: kdcore.RunView, options: Options) -> kdcore.Plan:
        teacher = run.label_only("teacher", run.teacher)
        student = run.distilled(run.student, teacher["teacher"])
        yield [teacher, student]
        return kdcore.Outcome(student["student"], teacher["teacher"])
