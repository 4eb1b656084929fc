"""Grid first, then every variant under every seed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import kdcore

from .options import VariantOptions, VariantsOptions

Point: TypeAlias = Mapping[str, Any]
"""What a point of a grid sets, e.g. ``{"kd.weight": 4}``."""

NAMED = 5
"""Variants that the name of a stage names."""


@dataclass(frozen=True)
class Student:
    """A learner of a stage: a variant at a point of its grid."""

    name: str
    variant: VariantOptions
    point: Point
    terms: tuple[kdcore.Term, ...]


class Variants:
    """Trains the teacher, then the grid of every variant, then every variant at its best point under every seed."""

    def plan(self, run: kdcore.RunView, options: VariantsOptions) -> kdcore.Plan:
        _check(run, options)
        grid = {v.name: list(_grid(v, run, f"strategy.variant[{i}].grid")) for i, v in enumerate(options.variant)}
        teacher = run.label_only("teacher", run.teacher)
        students = [Student(v.name, v, {}, run.terms(v.objective)) for v in options.variant]
        if tried := [student for points in grid.values() for student in points]:
            epochs = options.grid_epochs or run.epochs
            stages = _stages(run, teacher["teacher"], tried, epochs, options.together, "grid")
            stages = [dataclasses.replace(stage, diverged=options.diverged) for stage in stages]
            _, *results = yield [teacher, *stages]
            found = _learned(tried, stages, results)
            for i, variant in enumerate(options.variant):
                if points := grid[variant.name]:
                    best, choice = _chosen(points, found)
                    yield choice
                    students[i] = dataclasses.replace(best, name=variant.name)
        under: dict[int, list[kdcore.Stage]] = {}
        for seed in range(run.seed, run.seed + options.seeds):
            view = dataclasses.replace(run, seed=seed)
            under[seed] = _stages(view, teacher["teacher"], students, run.epochs, options.together, f"seed {seed}")
        _, *results = yield [teacher, *itertools.chain(*under.values())]
        rest = iter(results)
        learned = [_learned(students, stages, [next(rest) for _ in stages]) for stages in under.values()]
        return _outcome(students, learned, teacher["teacher"])


def _check(run: kdcore.RunView, options: VariantsOptions) -> None:
    """Names every loss, and refuses what cannot be."""
    names = [variant.name for variant in options.variant]
    for name in (*names, "teacher"):
        if (*names, "teacher").count(name) > 1:
            fix = "Give every variant a name of its own."
            raise kdcore.RecipeError(f"the name {name!r} is taken", where="strategy.variant", fix=fix)
    if run.controllers:
        fix = "Leave the controllers out: they act on one student."
        raise kdcore.RecipeError("variants take no controllers", where="controller", fix=fix)
    for variant in options.variant:
        run.terms(variant.objective)


def _grid(variant: VariantOptions, run: kdcore.RunView, where: str) -> Iterator[Student]:
    if variant.grid:
        points = itertools.product(*variant.grid.values())
        for number, values in enumerate(points, 1):
            point = dict(zip(variant.grid, values, strict=True))
            yield Student(f"{variant.name}-{number}", variant, point, _terms(variant, point, run, where))


def _terms(variant: VariantOptions, point: Point, run: kdcore.RunView, where: str) -> tuple[kdcore.Term, ...]:
    """The variant's objective with what the point sets in its tables; an error names the key of the grid."""
    labels = [term.label for term in run.terms(variant.objective)]
    tables = {label: dict(table) for label, table in zip(labels, variant.objective, strict=True)}
    for path, value in point.items():
        label, _, key = path.rpartition(".")
        if label not in tables:
            fix = f"Write TERM.OPTION; its terms are {', '.join(labels)}."
            raise kdcore.RecipeError("no such term", where=f'{where}."{path}"', fix=fix)
        tables[label][key] = value
    for label, table in tables.items():
        try:
            run.terms([table])
        except kdcore.RecipeError as error:
            path = f"{label}.{error.where.rpartition('.')[2]}"
            if path not in point:
                raise
            raise kdcore.RecipeError(error.what, where=f'{where}."{path}"', fix=error.fix) from None
    return run.terms(list(tables.values()))


def _stages(
    run: kdcore.RunView, teacher: kdcore.ResultRef, students: Sequence[Student], epochs: int, together: int, about: str
) -> list[kdcore.Stage]:
    """Stages of at most ``together`` students beside the teacher."""
    assert isinstance(teacher.stage, kdcore.Stage)
    source = kdcore.Member(teacher.stage.members[teacher.member].model, init=teacher)
    stages = []
    for start in range(0, len(students), together):
        group = students[start : start + together]
        learners = {s.name: kdcore.Member(run.student, terms=s.terms, optimizer=run.optimizer) for s in group}
        what = ", ".join(learners) if len(learners) <= NAMED else f"{len(learners)} variants"
        name = f"{source.model} -> {run.student} by {what} ({about})"
        members = {"teacher": source, **learners}
        stages.append(kdcore.Stage(name, members, run.data, epochs, seed=run.seed, keep=run.keep, ledger=run.ledger))
    return stages


def _learned(
    students: Iterable[Student], stages: Iterable[kdcore.Stage], results: Iterable[kdcore.Result]
) -> dict[str, kdcore.MemberResult]:
    """What became of each student."""
    names = {student.name for student in students}
    pairs = zip(stages, results, strict=True)
    return {name: result[name] for stage, result in pairs for name in stage.members if name in names}


def _chosen(tried: Sequence[Student], found: Mapping[str, kdcore.MemberResult]) -> tuple[Student, kdcore.Choice]:
    """The best point on the monitor split (of equal ones the first), and how far the next one is.

    Raises:
        NumericError: every point diverged.
    """
    sound = [student for student in tried if not found[student.name].diverged]
    if not sound:
        where, fix = f"variant {tried[0].variant.name!r}", "Lower train.lr, set train.clip, or try smaller weights."
        raise kdcore.NumericError("every point of its grid diverged", where=where, fix=fix)
    ranked = sorted(sound, key=lambda student: -_worth(found[student.name].accuracy))
    best, ours = ranked[0], found[ranked[0].name]
    lost = f" ({len(tried) - len(sound)} diverged)" if len(sound) < len(tried) else ""
    points = f"{_words(best.point)} of {len(tried)} points{lost}"
    text = f"{best.variant.name}: {points}, {ours.accuracy:.2%} on the monitor split"
    if edges := _edges(best):
        text += f", {' and '.join(edges)} at the edge of its grid"
    if len(ranked) == 1 or math.isnan(ours.accuracy):
        return best, kdcore.Choice(text, ours.ref)
    gap = kdcore.paired_difference([ours], [found[ranked[1].name]])
    return best, kdcore.Choice(f"{text}, before {_words(ranked[1].point)}", ours.ref, gap.mean, gap.error)


def _edges(student: Student) -> list[str]:
    """The keys of a point that are the smallest or largest of several numbers: a better one may lie beyond."""
    found = []
    for path, value in student.point.items():
        numbers = [v for v in student.variant.grid[path] if _is_number(v)]
        if _is_number(value) and min(numbers) < max(numbers) and value in (min(numbers), max(numbers)):
            found.append(path)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _outcome(
    students: Sequence[Student], learned: Sequence[Mapping[str, kdcore.MemberResult]], teacher: kdcore.ResultRef
) -> kdcore.Outcome:
    """The variant that is best on the monitor split, in the mean over seeds; its first student is delivered."""

    def mean(student: Student) -> float:
        return _worth(math.fsum(members[student.name].accuracy for members in learned) / len(learned))

    best, *others = sorted(students, key=mean, reverse=True)
    replicates = {s.name: tuple(members[s.name].ref for members in learned) for s in (best, *others)}
    points = "; ".join(f"{s.name}: {_words(s.point)}" for s in students if s.point)
    note = f"{best.name} is best on the monitor split." + (f" From the grid: {points}." if points else "")
    return kdcore.Outcome(replicates[best.name][0], teacher, note=note, replicates=replicates)


def _worth(accuracy: float) -> float:
    return -math.inf if math.isnan(accuracy) else accuracy


def _words(point: Point) -> str:
    return ", ".join(f"{path} = {value}" for path, value in point.items())
