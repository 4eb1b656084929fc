"""Checks of controllers: taken through a stage whose numbers come from a script.

The stage is a teacher's distillation into a student, prepared by the controller. One that is made for another kind of
stage says so by a static method ``example_stage(run: RunView) -> Stage``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any
from unittest import SkipTest

from ..errors import PlanError
from ..plan import BASE_METRICS, Decision, TickView, check_stage
from ..training.loop import decisions_of
from . import purity
from .rehearsal import Rehearsal, make, prepared, rehearse
from .strategy import Drive, identities, run_view
from .subject import Subject, advising, check, require

FREE = frozenset({"tick", "epoch", "lr"})
"""What a row always has; ``train.`` values too."""
KINDS_OF = {"share": "grad_norm", "cosine": "grad_cosine"}
"""Beginning of a row's name -> the name in ``needs`` that it stands for."""


def rising(tick: int) -> float:
    """The trained members get better, above the others from the second tick on."""
    return 0.45 + 0.04 * tick


def flat(tick: int) -> float:
    """Everyone is equally good."""
    return 0.5


def falling(tick: int) -> float:
    """The trained members get worse."""
    return 0.55 - 0.04 * tick


SCRIPTS: Sequence[Callable[[int], float]] = (rising, flat, falling)


def rehearsed(subject: Subject, script: Callable[[int], float]) -> Rehearsal:
    """As :func:`rehearse`.

    Raises:
        SkipTest: it fails on the way.
    """
    try:
        return rehearse(subject, script)
    except Exception as error:
        raise SkipTest(f"it does not get through its stage, see gives-decisions: {error}") from error


def replay(controller: Any, views: Sequence[TickView]) -> list[list[Decision]]:
    """The decisions of a controller under these views."""
    return [decisions_of("checked", controller.decide(copy.deepcopy(view))) for view in views]


@check
def options_survive_json(subject: Subject) -> None:
    """Its options are JSON from which the same options are read back.

    A stage holds them so.
    """
    purity.options_survive_json(subject)


@check
def needs_are_known(subject: Subject) -> None:
    """Its ``needs`` is a frozenset of metrics that exist.

    A name that nobody registered ends the stage before its first step.
    """
    needs = make(subject).needs
    fix = f"Write needs = frozenset({{...}}) with names of {', '.join(sorted(BASE_METRICS))} or of registered metrics."
    require(isinstance(needs, frozenset), f"its needs are {needs!r}", fix)
    known = BASE_METRICS | {entry.name for entry in subject.catalog.all("metric")}
    unknown = sorted(name for name in needs if name.rpartition("/")[2] not in known)
    require(not unknown, f"its needs name {unknown}, which nothing measures", fix)


@check
def prepares_a_sound_stage(subject: Subject) -> None:
    """Its ``prepare`` gives a sound stage, the same one twice, and leaves the given one as it is.

    Stages are shared between plans, and their keys are made of what they hold.
    """
    if not hasattr(subject.load(), "prepare"):
        raise SkipTest("it has no prepare()")
    first, second = identities(Drive([prepared(subject)])), identities(Drive([prepared(subject)]))
    require(first == second, "prepare() gives another stage the second time", "Let it depend on its arguments alone.")
    try:
        check_stage(prepared(subject))
    except PlanError as error:
        raise AssertionError(f"prepare() gives a stage that is not sound: {error}") from None
    _leaves_the_stage(subject)


def _leaves_the_stage(subject: Subject) -> None:
    run = run_view()
    stage = run.distilled(run.student, run.label_only("teacher", run.teacher)["teacher"])
    before = identities(Drive([dataclasses.replace(stage)]))  # a copy: a stage computes its identity once
    subject.load().prepare(stage, run, subject.example())
    fix = "Return dataclasses.replace(stage, members={**stage.members, ...})."
    after = identities(Drive([dataclasses.replace(stage)]))
    require(after == before, "prepare() changes the stage that it is given", fix)


@check
def gives_decisions(subject: Subject) -> None:
    """It decides at every tick of good, flat and bad stages, and gives decisions or nothing.

    A stage that meets an error in ``decide`` has lost an epoch.
    """
    for script in SCRIPTS:
        rehearse(subject, script)


@check
def survives_ticks_without_numbers(subject: Subject) -> None:
    """It decides where no member has a row with an accuracy.

    Members that do not classify have none, nor do dropped ones; ``view.now`` gives None then.
    """
    with advising("Return [] where view.now(...) is None."):
        rehearse(subject, lambda tick: None)


@check
def touches_what_exists(subject: Subject) -> None:
    """It sets knobs that the stage has to values that fit them, and drops members that are there.

    Anything else ends the stage. A controller for a special kind of stage has ``prepare`` or ``example_stage``.
    """
    for script in SCRIPTS:
        problems = rehearsed(subject, script).problems
        require(not problems, "; ".join(problems[:1]), "Look at view.knobs and view.curves for what is there.")


@check
def decides_alike(subject: Subject) -> None:
    """The same views give the same decisions.

    A stage that is resumed from an older checkpoint goes through the same ticks again.
    """
    for script in SCRIPTS:
        found = rehearsed(subject, script)
        again = replay(make(subject), found.views)
        fix = "Decide by the view and by your state alone."
        require(again == found.decisions, f"under {script.__name__} results it decides otherwise the second time", fix)


@check
def state_is_json(subject: Subject) -> None:
    """Its state is JSON after every tick.

    It goes into checkpoints.
    """
    for script in SCRIPTS:
        controller = make(subject)
        for view in rehearsed(subject, script).views:
            controller.decide(view)
            _as_json(controller.state_dict())


def _as_json(state: Any) -> Any:
    try:
        return json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"its state {state!r} is not JSON: {error}. Use numbers, strings and lists.") from None


@check
def goes_on_from_its_state(subject: Subject) -> None:
    """Interrupted after any tick, it decides on as if it had not been.

    A run may be killed at any time and goes on from a checkpoint, with a new controller that gets the state from JSON.
    """
    for script in SCRIPTS:
        found = rehearsed(subject, script)
        if replay(make(subject), found.views) != found.decisions:
            raise SkipTest("it decides otherwise every time, see decides-alike")
        for tick in range(1, len(found.views)):
            old, new = make(subject), make(subject)
            replay(old, found.views[:tick])
            try:
                state = _as_json(old.state_dict())
            except AssertionError:
                raise SkipTest("its state is not JSON, see state-is-json") from None
            new.load_state_dict(state)
            rest = replay(new, found.views[tick:])
            fix = "state_dict() has to hold everything that decide() remembers, and load_state_dict() to take it all."
            require(rest == found.decisions[tick:], f"resumed after tick {tick} it decides otherwise", fix)


@check
def keeps_its_view(subject: Subject) -> None:
    """It does not change the view.

    All controllers of a stage get the same one.
    """
    for script in SCRIPTS:
        controller = make(subject)
        for view in rehearsed(subject, script).views:
            seen = copy.deepcopy(view)
            controller.decide(view)
            require(view == seen, f"it changes the view of tick {view.tick}", "Copy what you want to change.")


@check
def reads_what_it_needs(subject: Subject) -> None:
    """It reads only metrics that its ``needs`` names; ``tick``, ``epoch``, ``lr`` and ``train.`` values are free.

    A metric that is not named need not be measured, and its code is no part of the result's key.
    """
    needs = make(subject).needs
    for script in SCRIPTS:
        read = {name for name in rehearsed(subject, script).read - FREE if not name.startswith("train.")}
        missing = sorted({KINDS_OF.get(name.partition(".")[0], name) for name in read} - needs)
        require(not missing, f"it reads {missing}, which its needs does not name", f"Add {missing} to needs.")


@check
def draws_no_random_numbers(subject: Subject) -> None:
    """It leaves the global generators of Python, numpy and torch alone.

    What is drawn later in the stage would change, and a resumed stage would differ from an uninterrupted one.
    """
    views = rehearsed(subject, flat).views
    with purity.no_random_numbers():
        replay(make(subject), views)


@check
def reads_no_clock(subject: Subject) -> None:
    """It decides the same at another time of day, and in another year.

    A stage may be resumed a week later.
    """
    for script in SCRIPTS:
        found = rehearsed(subject, script)
        if replay(make(subject), found.views) != found.decisions:
            raise SkipTest("it decides otherwise every time, see decides-alike")
        with purity.shifted_clock(subject.load()):
            later = replay(make(subject), found.views)
        require(later == found.decisions, "with another clock it decides otherwise", "Decide by the view alone.")


@check
def leaves_the_process_alone(subject: Subject) -> None:
    """It changes neither the working folder nor the environment nor attributes of its class.

    Other stages in the same process would see the change.
    """
    with purity.process_left_alone(subject.load()):
        rehearsed(subject, flat)
