"""A stage without training: its members and knobs are real, its numbers come from a script."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import nn

from ..data import DataInfo, SourceContext, Split, TrainData
from ..errors import PlanError
from ..plan import BASE_METRICS, Decision, Drop, Finish, Set, Spec, Stage, TickView
from ..registry import Catalog
from ..training.knobs import Knobs
from ..training.loop import decisions_of
from ..training.member import Learner, LiveTerm
from ..transforms import build_transform
from .made_up import build
from .strategy import run_view
from .subject import Subject

TICKS = 12


class Row(dict[str, float]):
    """One tick of a curve, which notes what is read."""

    def __init__(self, values: Mapping[str, float], read: set[str]) -> None:
        super().__init__(values)
        self.read = read

    def __getitem__(self, name: str) -> float:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


@dataclasses.dataclass
class Rehearsal:
    """What a controller saw and decided at each tick, what it read, and which decisions could not be carried out."""

    views: list[TickView] = dataclasses.field(default_factory=list)
    decisions: list[list[Decision]] = dataclasses.field(default_factory=list)
    read: set[str] = dataclasses.field(default_factory=set)
    problems: list[str] = dataclasses.field(default_factory=list)


def rehearse(subject: Subject, script: Callable[[int], float | None]) -> Rehearsal:
    """Takes a new controller through its stage.

    Args:
        subject: the controller.
        script: the accuracy of every trained member at a tick, from 1; others have 0.5. None: no numbers at all.
    """
    stage = prepared(subject)
    controller, found = make(subject), Rehearsal()
    learners = _learners(stage, subject.catalog)
    knobs = Knobs(learners, list(_data_parts(stage, subject.catalog)))
    curves: dict[str, list[Row]] = {}
    names = metric_names(controller)
    for tick in range(1, ticks_of(stage) + 1):
        for name, trained in _present(learners, knobs):
            curves.setdefault(name, []).append(
                Row(_row(tick, learners[name], trained, script(tick), names), found.read)
            )
        view = _view(stage, tick, curves, knobs, found.read, script(tick) is not None)
        found.views.append(copy.deepcopy(view))
        found.decisions.append(decisions_of(subject.name, controller.decide(view)))
        for decision in found.decisions[-1]:
            _carry_out(decision, learners, knobs, found.problems)
        if any(isinstance(decision, Finish) for decision in found.decisions[-1]):
            break
    return found


def make(subject: Subject) -> Any:
    """A new controller."""
    return subject.load()(subject.example())


def prepared(subject: Subject) -> Stage:
    """The stage that a controller is made for: a distilled one, or its own ``example_stage(run)``; prepared by it."""
    cls, options = subject.load(), subject.example()
    run = run_view(controllers=(Spec(subject.name, options.model_dump(mode="json")),), epochs=TICKS)
    if hasattr(cls, "example_stage"):
        stage: Stage = cls.example_stage(run)
    else:
        stage = run.distilled(run.student, run.label_only("teacher", run.teacher)["teacher"])
    return cls.prepare(stage, run, options) if hasattr(cls, "prepare") else stage


def ticks_of(stage: Stage) -> int:
    """Its length in ticks."""
    return stage.length if stage.tick == "epoch" else stage.length // stage.tick


def metric_names(controller: Any) -> frozenset[str]:
    """The registered metrics that a controller asks for."""
    return frozenset(controller.needs) - BASE_METRICS


def _learners(stage: Stage, catalog: Catalog) -> dict[str, Learner]:
    learners = {name: Learner(name, member, nn.Identity()) for name, member in stage.members.items()}
    for learner in learners.values():
        for term in learner.spec.terms:
            entry = catalog.find("loss", term.loss)
            options = entry.options_class()(**term.options)
            module = build(entry.load(), options, catalog)
            spec = dataclasses.replace(term, options=options.model_dump(mode="json"))  # as a recipe's terms have them
            learner.terms.append(LiveTerm(spec, module, type(options), lambda epoch, warm: 1.0, term.source))
    return learners


def _data_parts(stage: Stage, catalog: Catalog) -> Iterator[Any]:
    """Transforms and source over eight grey samples, for the knobs that they offer."""
    spec = stage.data
    split = Split(torch.zeros(8, 1, 8, 8), torch.arange(8) % 2)
    data = TrainData(split, DataInfo((1, 8, 8), 2), (0.0,), (1.0,), "0" * 64)
    transforms = [build_transform(item, catalog, data.info) for item in spec.transforms]
    context = SourceContext(data, 0, 2, False, tuple(transforms), torch.device("cpu"))
    entry = catalog.find("source", spec.source.name)
    yield entry.load()(entry.options_class()(**spec.source.options), context)
    yield from transforms


def _present(learners: Mapping[str, Learner], knobs: Knobs) -> list[tuple[str, bool]]:
    """Members with a row at this tick, with True if they are trained: as the loop settles it."""
    trained, sources = [], set()
    for learner in learners.values():
        for term in learner.terms:
            term.weight = float(knobs.values[f"{learner.name}.{term.label}.weight"])
        if learner.live():
            trained.append(learner.name)
            sources |= {term.source for term in learner.live() if term.source is not None}
    return [(name, True) for name in trained] + [(name, False) for name in sorted(sources - set(trained))]


def _row(
    tick: int, learner: Learner, trained: bool, accuracy: float | None, metrics: frozenset[str]
) -> dict[str, float]:
    row = {"tick": float(tick), "epoch": float(tick)}
    if trained:
        row |= {"train.loss": 1.0, "lr": 0.1} | {f"train.{term.label}": 1.0 for term in learner.live()}
    if accuracy is None:
        return row
    share = accuracy if trained else 0.5
    row |= {"accuracy": share, "loss": 1 - share}
    if trained:
        row |= {f"share.{term.label}": 1 / len(learner.live()) for term in learner.live()}
        row |= {f"cosine.{a.label}.{b.label}": 2 * share - 1 for a, b in combinations(learner.live(), 2)}
        row |= dict.fromkeys(metrics, 1 - share)
    return row


def _view(
    stage: Stage, tick: int, curves: Mapping[str, list[Row]], knobs: Knobs, read: set[str], numbers: bool
) -> TickView:
    other = {"accuracy": 0.5, "loss": 0.5} if numbers else {}
    used = tuple(Row({"tick": float(t), "epoch": float(t), **other}, read) for t in range(1, ticks_of(stage) + 1))
    return TickView(
        tick=tick,
        epoch=float(tick),
        step=10 * tick,
        length=ticks_of(stage),
        curves={name: tuple(curve) for name, curve in curves.items()},
        used=dict.fromkeys(stage.uses, used),
        knobs=dict(knobs.values),
    )


def _carry_out(decision: Decision, learners: Mapping[str, Learner], knobs: Knobs, problems: list[str]) -> None:
    if isinstance(decision, Drop):
        if decision.member in learners:
            learners[decision.member].dropped = True
        else:
            problems.append(f"it drops {decision.member!r}, which is none of the members {sorted(learners)}")
    elif isinstance(decision, Set):
        try:
            knobs.set(decision.knob, decision.value)
        except PlanError as error:
            problems.append(f"it sets {decision.knob!r} to {decision.value!r}: {error}")
