"""A search driven by hand: scripted accuracies, no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdcore_dskd import DynamicStop
from kdcore_search import Search

from kdcore import Choice, MemberResult, ModelRef, Outcome, Result, RunView, Spec, Stage
from kdcore.options import validate
from kdcore.testing.strategy import run_view

IMAGES = 100
Path = tuple[int, ...]
"""Sizes from the teacher to a learner, e.g. (10, 4, 2)."""


def mlp(size: int, **options: Any) -> ModelRef:
    return ModelRef("mlp", {"size": size, **options})


def table(candidate: int | dict[str, Any]) -> dict[str, Any]:
    return {"model": "mlp", "size": candidate} if isinstance(candidate, int) else candidate


def view(teacher: int = 10, student: int = 2, **changes: Any) -> RunView:
    """A run from one mlp to another; a size measures as 1,000 parameters."""
    return run_view(**{"teacher": mlp(teacher), "student": mlp(student), **changes})


def dskd_view(teacher: int = 10, student: int = 2, **changes: Any) -> RunView:
    """The same under dskd, whose controls are stages of their own."""

    def prepare(spec: Spec, stage: Stage, run: RunView) -> Stage:
        return DynamicStop.prepare(stage, run, DynamicStop.Options())

    return view(teacher, student, controllers=(Spec("dskd/dskd"),), prepare=prepare, **changes)


def path_of(stage: Stage) -> Path:
    """The sizes from the first teacher to who learns here; of a control, its own alone."""
    role = next(name for name, member in stage.members.items() if member.terms or len(stage.members) == 1)
    size = stage.members[role].model.options["size"]
    above = stage.members.get("teacher") if role == "student" else None
    return (*path_of(above.init.stage), size) if above else (size,)


@dataclass
class Driven:
    """What a search asked for, request by request, what it chose, and what it returned."""

    asked: list[list[Stage]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    outcome: Outcome = None

    @property
    def stages(self) -> list[Stage]:
        return [stage for request in self.asked for stage in request]

    @property
    def identities(self) -> list[str]:
        return [stage.identity for stage in self.stages]

    def students(self, size: int = 2) -> list[list[Path]]:
        """The chains whose students each request brings; requests without any are left out."""
        found = [[path_of(s) for s in request if "student" in s.members] for request in self.asked]
        return [kept for request in found if (kept := [path for path in request if path[-1] == size])]

    @property
    def chosen(self) -> Path:
        return path_of(self.outcome.student.stage)

    @property
    def texts(self) -> list[str]:
        return [choice.text for choice in self.choices]


Script = Callable[[Stage], "float | bytes"]
"""What a learner is worth: its accuracy, or a byte for each monitor image."""


def by_path(known: Mapping[Path, float | bytes], other: float = 0.5) -> Script:
    return lambda stage: known.get(path_of(stage), other)


def drive(
    script: Script | Mapping[Path, float | bytes],
    candidates: Sequence[int | dict[str, Any]] = (4, 6, 8),
    run: RunView | None = None,
    seconds: Callable[[Stage], float] = lambda stage: 1.0,
    share: float = 1.0,
    **options: Any,
) -> Driven:
    """Takes a search to its end.

    Args:
        script: what each stage's learners are worth.
        candidates: sizes of mlps, or tables.
        run: its view.
        seconds: that a stage takes.
        share: of the estimated FLOPs that a stage takes.
        options: of the search.
    """
    run = run or view()
    script = by_path(script) if isinstance(script, Mapping) else script
    checked = validate(Search.Options, {"candidates": [*map(table, candidates)], **options}, "strategy")
    plan, answer, found = Search().plan(run, checked), None, Driven()
    while True:
        try:
            wanted = plan.send(answer)
        except StopIteration as end:
            found.outcome = end.value
            return found
        answer = None
        if isinstance(wanted, Choice):
            assert wanted.best.stage.identity in found.identities
            found.choices.append(wanted)
        else:
            assert wanted
            found.asked.append(wanted)
            answer = [answered(s, script(s), seconds(s), int(share * run.estimate(s))) for s in wanted]
            found.results += answer


def answered(stage: Stage, worth: float | bytes, seconds: float, flops: int) -> Result:
    accuracy = sum(worth) / len(worth) if isinstance(worth, bytes) else worth
    correct = worth if isinstance(worth, bytes) else b""
    learners = [name for name, member in stage.members.items() if member.terms or len(stage.members) == 1]
    members = {name: MemberResult(stage[name], accuracy, accuracy, (), 1000, 1000, correct) for name in learners}
    return Result(stage, stage.identity, members, (), seconds, flops)


def images(right: int, total: int = IMAGES) -> bytes:
    """The first images are right, the others wrong."""
    return bytes([1] * right + [0] * (total - right))
