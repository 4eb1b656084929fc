"""Checks of strategies: driven by scripted results, without data, models or torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from unittest import SkipTest

from ..codec import canonical, decode, digest, encode
from ..errors import PlanError
from ..plan import (
    Choice,
    MemberResult,
    ModelRef,
    OptimizerSpec,
    Outcome,
    Result,
    SourceSpec,
    Spec,
    Stage,
    Term,
    check_stage,
)
from ..runview import ModelCost, RunView
from . import purity
from .subject import Subject, advising, check, require

LONGEST = 200
"""Stages after which a strategy counts as endless."""

KD = {"temperature": 4.0, "normalize": "none", "eps": None}


def run_view(**changes: Any) -> RunView:
    """A run as a strategy sees it, without data or models behind it; ``changes`` replace fields."""
    labels = Term("cross_entropy", None, options={"label_smoothing": 0.0})
    view = RunView(
        seed=0,
        teacher=ModelRef("cnn", {"size": 3}),
        student=ModelRef("mlp", {"size": 1}),
        objective=(labels, Term("kd", options=KD)),
        labels=(labels,),
        optimizer=OptimizerSpec(),
        data=SourceSpec(Spec("digits")),
        epochs=3,
        model=lambda table: ModelRef(table["model"], {k: v for k, v in table.items() if k != "model"}),
        terms=lambda tables: tuple(map(_term, tables)),
        measure=lambda model: ModelCost(1000 * _size(model), 1000 * _size(model)),
        estimate=lambda stage: 1000 * stage.length * sum(_size(member.model) for member in stage.members.values()),
    )
    return dataclasses.replace(view, **changes)


def _term(table: Mapping[str, Any]) -> Term:
    options = {key: value for key, value in table.items() if key not in ("loss", "weight", "name")}
    source = None if table["loss"] == "cross_entropy" else "teacher"
    return Term(table["loss"], source, table.get("weight", 1.0), options, table.get("name", ""))


def _size(model: ModelRef) -> int:
    return int(model.options.get("size", 1))


# ---------------------------------------------------------------- scripted results


def rising(number: int) -> float:
    """Accuracies that rise from stage to stage, ever more slowly."""
    return 1 - 0.5 * 0.97**number


def flat(number: int) -> float:
    """The same accuracy after every stage."""
    return 0.5


def falling(number: int) -> float:
    """Accuracies that fall towards chance."""
    return 0.1 + 0.8 * 0.97**number


def nothing(number: int) -> float:
    """No accuracy, as of a member that does not classify."""
    return float("nan")


@dataclasses.dataclass
class Drive:
    """What a strategy asked for, in order, what it returned at its end (None if it did not end), and its choices, each
    with the number of stages asked for before.
    """

    asked: list[Stage]
    outcome: Any = None
    choices: list[tuple[Choice, int]] = dataclasses.field(default_factory=list)


def drive(subject: Subject, script: Callable[[int], float] = rising, view: RunView | None = None) -> Drive:
    """Runs a new instance of a strategy to its end, or for :data:`LONGEST` stages.

    The n-th stage, from 1, has the accuracy ``script(n)``.

    Raises:
        AssertionError: it yields something else than stages.
    """
    plan, answer, found = subject.load()().plan(view or run_view(), subject.example()), None, Drive([])
    require(hasattr(plan, "send"), "plan() is not a generator", "Yield stages, and return a kdcore.Outcome.")
    while len(found.asked) < LONGEST:
        try:
            wanted = plan.send(answer)
        except StopIteration as end:
            found.outcome = end.value
            return found
        answer = _answer(found, wanted, script)
    return found


def _answer(found: Drive, wanted: Any, script: Callable[[int], float]) -> Any:
    if isinstance(wanted, Choice):
        found.choices.append((wanted, len(found.asked)))
        return None
    stages, results = wanted if isinstance(wanted, list) else [wanted], []
    right = bool(stages) and all(isinstance(stage, Stage) for stage in stages)
    require(right, f"it yields {wanted!r}", "Yield a kdcore.Stage, or a list of some.")
    for stage in stages:
        found.asked.append(stage)
        results.append(_result(stage, len(found.asked), script(len(found.asked))))
    return results if isinstance(wanted, list) else results[0]


def _result(stage: Stage, number: int, accuracy: float) -> Result:
    ticks = stage.length if stage.tick == "epoch" else stage.length // stage.tick
    curve = tuple({"tick": t, "epoch": t, "accuracy": accuracy, "loss": 1 - accuracy} for t in range(1, ticks + 1))
    members = {name: MemberResult(stage[name], accuracy, accuracy, curve, 1000, 1000) for name in stage.members}
    return Result(stage, digest(number), members, (), 1.0, 1000)


def identities(found: Drive) -> list[str]:
    """What tells two stages apart in a replay, of every stage that was asked for."""
    try:
        return [stage.identity for stage in found.asked]
    except (PlanError, ValueError):
        raise SkipTest("its stages are not JSON, see stages-are-json") from None


# ---------------------------------------------------------------- checks


@check
def options_survive_json(subject: Subject) -> None:
    """Its options are JSON from which the same options are read back.

    Recipes, journals and result files hold them so.
    """
    purity.options_survive_json(subject)


@check
def ends_on_good_results(subject: Subject) -> None:
    """It ends with an Outcome if every stage is better than the one before.

    A search that goes on while it wins has to be bounded by something else.
    """
    _ends(subject, rising)


@check
def ends_on_flat_results(subject: Subject) -> None:
    """It ends with an Outcome if all stages are equally good.

    On small monitor splits equal accuracies are common, so that ties want a rule.
    """
    _ends(subject, flat)


@check
def ends_on_bad_results(subject: Subject) -> None:
    """It ends with an Outcome if every stage is worse than the one before.

    A user gets the best of what was tried and a note, not a traceback after hours of training.
    """
    _ends(subject, falling)


@check
def ends_on_results_without_numbers(subject: Subject) -> None:
    """It ends with an Outcome if no stage has an accuracy (NaN).

    Members that do not classify have none, and every comparison with NaN is false.
    """
    _ends(subject, nothing)


def _ends(subject: Subject, script: Callable[[int], float]) -> None:
    found = drive(subject, script)
    fix = "Bound the number of stages, e.g. by an option."
    require(len(found.asked) < LONGEST, f"it asks for {LONGEST} stages and more", fix)
    require(isinstance(found.outcome, Outcome), f"it returns {found.outcome!r}", "Return a kdcore.Outcome.")


@check
def ends_with_a_given_teacher(subject: Subject) -> None:
    """It ends with an Outcome if the teacher's weights are given.

    ``teacher = { weights = ... }`` is a recipe's usual way to skip the teacher's training: its stage has length 0 and
    an empty curve.
    """
    given = run_view(teacher=ModelRef("cnn", {"size": 3}, "teacher.safetensors"))
    if not isinstance(drive(subject).outcome, Outcome):
        raise SkipTest("it never returns an Outcome, see ends-on-good-results")
    with advising("A given teacher's stage has length 0 and an empty curve: read accuracy instead."):
        outcome = drive(subject, rising, given).outcome
    require(isinstance(outcome, Outcome), f"it returns {outcome!r}", "Return a kdcore.Outcome then, too.")


@check
def outcome_was_asked_for(subject: Subject) -> None:
    """The outcome's student is a member of a stage that it asked for.

    Otherwise a stage is trained after the last decision, and nobody has looked at its result.
    """
    found = drive(subject)
    if not isinstance(found.outcome, Outcome):
        raise SkipTest("it returns no Outcome, see ends-on-good-results")
    fix = 'Yield the stage first, and return Outcome(stage["student"]).'
    _is_known(found.outcome.student, identities(found), "the outcome's student", fix)


@check
def choices_are_of_what_was_asked_for(subject: Subject) -> None:
    """The best of every choice is a member of a stage that it asked for before.

    A run that is interrupted delivers the last choice's best: it must be trained by then.
    """
    for script in (rising, flat, falling):
        found = drive(subject, script)
        known = identities(found)
        for choice, number in found.choices:
            fix = 'Yield the stage first, then Choice(text, best=stage["student"]).'
            _is_known(choice.best, known[:number], f"the best of the choice {choice.text!r}", fix)


def _is_known(ref: Any, known: list[str], what: str, fix: str) -> None:
    """Requires a member of a stage that is among these identities."""
    stage = getattr(ref, "stage", None)
    if not isinstance(stage, Stage):
        raise AssertionError(f"{what} is a member of {stage!r}. {fix}")
    (own,) = identities(Drive([stage]))
    require(own in known, f"it never asked for the stage {stage.name!r} of {what}", fix)
    require(ref.member in stage.members, f"{what}, {ref.member!r}, is none of its stage's {sorted(stage.members)}", fix)


@check
def stages_are_json(subject: Subject) -> None:
    """Every stage is JSON, from which an equal stage is read back.

    Keys, journals and worker processes get stages in this form.
    """
    for stage in drive(subject).asked:
        try:
            data = encode(stage, lambda other: "0" * 64)
            again = encode(decode(stage.name, data), str)
        except (PlanError, ValueError) as error:
            raise AssertionError(f"stage {stage.name!r}: {error}") from None
        fix = "Put numbers, strings, lists and tables into options, nothing else."
        require(canonical(again) == canonical(data), f"stage {stage.name!r} comes back from JSON as another", fix)


@check
def stages_are_sound(subject: Subject) -> None:
    """Every stage has members, terms with sources that exist, and an optimizer where there are terms.

    The run would end with the same error, after the stages before it were trained.
    """
    for stage in drive(subject).asked:
        try:
            check_stage(stage)
        except PlanError as error:
            raise AssertionError(str(error)) from None


@check
def replays(subject: Subject) -> None:
    """It asks for the same stages when it gets the same results.

    A killed run is resumed by replaying the strategy over the results that are there.
    """
    for script in (rising, flat, falling):
        first, second = identities(drive(subject, script)), identities(drive(subject, script))
        fix = "plan() must depend on options and results alone: no counters, no random numbers, no order of sets."
        require(first == second, f"under {script.__name__} results a replay asks for other stages", fix)


@check
def draws_no_random_numbers(subject: Subject) -> None:
    """It leaves the global generators of Python, numpy and torch alone.

    A replay draws again, and whatever is drawn later in the process would change.
    """
    with purity.no_random_numbers():
        drive(subject)


@check
def reads_no_clock(subject: Subject) -> None:
    """It asks for the same stages at another time of day, and in another year.

    A run may be resumed a week later.
    """
    first, second = identities(drive(subject)), identities(drive(subject))
    if first != second:
        raise SkipTest("it asks for other stages at every replay, see replays")
    with purity.shifted_clock(subject.load()):
        later = identities(drive(subject))
    require(first == later, "with another clock it asks for other stages", "Decide by results alone.")


@check
def leaves_the_process_alone(subject: Subject) -> None:
    """It changes neither the working folder nor the environment nor attributes of its class.

    Other runs in the same process, and its own replay, would see the change.
    """
    with purity.process_left_alone(subject.load()):
        drive(subject)
