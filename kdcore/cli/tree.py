"""The tree of chains, grown from a run's events alone: every model stands under the one that it was distilled from.

A chain under several seeds is one node, and so is a chain with controllers and the same chain without.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from ..chains import CONTROL, teacher_of
from ..job import Event
from ..report.curves import stops
from ..report.formats import weight

Place: TypeAlias = tuple[tuple[str, str, int], ...]
"""From the root to a node: model, role ("control" or empty), and a number where one stage is like another."""
State: TypeAlias = Literal["waiting", "running", "finished", "reused"]


@dataclass(frozen=True)
class Learner:
    """A model under one seed, so far.

    Args:
        seed: of its stage.
        state: of its stage.
        tick: ticks that are over, with the part of the one that goes on.
        ticks: of the whole stage; 0 while that is not known.
        unit: what a tick is called.
        accuracy: share of the monitor split: at the latest tick, in the end of the delivered weights; None if unknown.
        control: likewise of its label-only control, once that is finished.
        stopped: epoch, or step of a stream, at which distillation was ended; None if it was not.
    """

    seed: int
    state: State
    tick: float
    ticks: int
    unit: str
    accuracy: float | None
    control: float | None
    stopped: float | None

    @property
    def is_done(self) -> bool:
        return self.state in ("finished", "reused")


@dataclass(frozen=True)
class Node:
    """A model at the end of a chain.

    Args:
        chain: models from the root to this one.
        role: "control" if it was asked for as one, else empty.
        learners: one a seed.
        without: the same without controllers, where the run has some.
        children: what was distilled from it, in the order in which it was asked for.
        is_best: on the best chain so far.
    """

    chain: tuple[str, ...]
    role: str
    learners: tuple[Learner, ...]
    without: tuple[Learner, ...]
    children: tuple[Node, ...]
    is_best: bool

    @property
    def is_done(self) -> bool:
        return all(learner.is_done for learner in (*self.learners, *self.without))


@dataclass(frozen=True)
class Tree:
    """What is known of a run: its roots, the controllers that its chains were trained under, and its choices."""

    roots: tuple[Node, ...]
    controllers: tuple[str, ...]
    choices: tuple[str, ...]


@dataclass(frozen=True)
class _Stage:
    """A stage as it was asked for, and how far it is."""

    about: Mapping[str, Any]
    state: State = "waiting"
    tick: float = 0
    ticks: int = 0
    every: int | str = "epoch"
    accuracy: Mapping[str, float | None] = field(default_factory=dict)
    events: tuple[Mapping[str, Any], ...] = ()


class Growth:
    """Takes events one by one, and gives the tree as it is now. Events of unknown stages change nothing."""

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}
        self._places: dict[Place, list[tuple[str, str]]] = {}
        self._place_of: dict[tuple[str, str], Place] = {}
        self._like: Counter[tuple[Any, ...]] = Counter()
        self._controllers: dict[str, None] = {}
        self._choices: list[str] = []
        self._best: Place = ()

    def add(self, event: Event) -> None:
        """Takes one event; kinds that say nothing of the tree are passed over."""
        kind = event["kind"]
        if kind == "asked":
            for stage in event["stages"]:
                self._ask(stage)
        elif kind == "choice":
            self._choices.append(choice_text(event))
            self._best = self._place_of.get((event["best"]["stage"], event["best"]["member"]), self._best)
        elif event.get("key") in self._stages:
            self._stages[event["key"]] = _later(self._stages[event["key"]], event)

    def tree(self) -> Tree:
        """What the events so far say."""
        children = self._children()
        roots = tuple(self._node(place, children) for place in children.get((), ()))
        return Tree(roots, tuple(self._controllers), tuple(self._choices))

    def of(self, key: str) -> list[Node]:
        """The nodes that a stage belongs to: one for each member that it trains."""
        children = self._children()
        places = dict.fromkeys(place for (stage, _), place in self._place_of.items() if stage == key)
        return [self._node(place, children) for place in places]

    def _children(self) -> dict[Place, list[Place]]:
        children: dict[Place, list[Place]] = {}
        for place in self._places:
            children.setdefault(place[:-1], []).append(place)
        return children

    def _ask(self, stage: Mapping[str, Any]) -> None:
        self._stages[stage["key"]] = _Stage(stage)
        self._controllers |= dict.fromkeys(stage["controllers"])
        for role, member in stage["members"].items():
            if member["trained"] or role not in stage["inputs"]:
                place = self._new_place(stage, role, member["model"])
                self._place_of[stage["key"], role] = place
                self._places.setdefault(place, []).append((stage["key"], role))

    def _new_place(self, stage: Mapping[str, Any], role: str, model: str) -> Place:
        """Seeds share a place, and so do a chain with controllers and without; else equal stages stand side by side."""
        above = self._place_of.get(teacher_of(stage, role) or ("", ""), ())
        kind = CONTROL if role == CONTROL else ""
        like = (above, model, kind, stage["seed"], bool(stage["controllers"]))
        self._like[like] += 1
        return (*above, (model, kind, self._like[like]))

    def _node(self, place: Place, children: Mapping[Place, Sequence[Place]]) -> Node:
        learners: list[Learner] = []
        without: list[Learner] = []
        for key, role in self._places[place]:
            about = self._stages[key].about
            bare = self._controllers and not about["controllers"] and teacher_of(about, role)
            (without if bare else learners).append(self._learner(key, role))
        return Node(
            chain=tuple(model for model, _, _ in place),
            role=place[-1][1],
            learners=tuple(sorted(learners, key=lambda learner: learner.seed)),
            without=tuple(sorted(without, key=lambda learner: learner.seed)),
            children=tuple(self._node(child, children) for child in children.get(place, ())),
            is_best=place == self._best[: len(place)],
        )

    def _learner(self, key: str, role: str) -> Learner:
        stage = self._stages[key]
        seen = {"tick": stage.every, "events": stage.events, "members": stage.about["members"]}
        ended = stops(seen) if teacher_of(stage.about, role) else []
        return Learner(
            seed=stage.about["seed"],
            state=stage.state,
            tick=stage.tick,
            ticks=stage.ticks,
            unit="epoch" if stage.every == "epoch" else "tick",
            accuracy=stage.accuracy.get(role),
            control=self._control(key, role),
            stopped=ended[0].at if ended else None,
        )

    def _control(self, key: str, role: str) -> float | None:
        """Final accuracy of the control of a distilled learner: of its own stage, or of one that the stage reads."""
        about = self._stages[key].about
        link = about["uses"].get(CONTROL, {"stage": key, "member": CONTROL})
        stage = self._stages.get(link["stage"])
        if stage is None or stage.state not in ("finished", "reused") or teacher_of(about, role) is None:
            return None
        return stage.accuracy.get(link["member"])


def _later(stage: _Stage, event: Event) -> _Stage:
    """The stage after an event of its own."""
    kind = event["kind"]
    if kind == "stage_started":
        return replace(
            stage, state="running", tick=event["tick"], ticks=event["ticks"], every=event["every"],
            events=tuple(event["events"]),
        )  # fmt: skip
    if kind == "log":
        return replace(stage, tick=event["done"])
    if kind == "tick":
        accuracy = {**stage.accuracy, **{name: row.get("accuracy") for name, row in event["metrics"].items()}}
        return replace(stage, tick=event["tick"], ticks=event["ticks"], accuracy=accuracy)
    if kind == "decision":
        return replace(stage, events=(*stage.events, event["event"]))
    if kind == "stage_finished":
        result = event["result"]
        accuracy = {name: member["monitor_accuracy"] for name, member in result["members"].items()}
        return replace(
            stage, state="reused" if result["reused"] else "finished", tick=result["ticks"], ticks=result["ticks"],
            every=result["tick"], accuracy=accuracy, events=tuple(result["events"]),
        )  # fmt: skip
    return stage


def choice_text(choice: Event) -> str:
    """``10-4-2 instead of 10-2: +0.12 points ± 0.20 (one standard error), within noise``."""
    if choice["margin"] is None:
        return str(choice["text"])
    error = "" if choice["error"] is None else f" ± {100 * choice['error']:.2f} (one standard error)"
    said = f"{choice['text']}: {100 * choice['margin']:+.2f} points{error}"
    return ", ".join(filter(None, [said, weight(choice["margin"], choice["error"])]))


def spread(values: Sequence[float]) -> str:
    """``97.31 ± 0.12``: mean and standard deviation of shares in percent; of one, itself; of none, nothing."""
    if not values:
        return ""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean
