"""What a strategy is, and what it knows of its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .errors import PlanError
from .plan import Cache, Json, Member, ModelRef, OptimizerSpec, Plan, ResultRef, SourceSpec, Spec, Stage, Term


class UnmeasuredError(Exception):
    """Models are measured when a run begins: while its recipe is checked, torch is not imported."""


def _unmeasured(what: ModelRef | Stage) -> Any:
    raise UnmeasuredError(str(what))


@dataclass(frozen=True)
class ModelCost:
    """Number of parameters, and FLOPs of one image forward (two for a multiply-add)."""

    params: int
    flops: int


class Strategy(Protocol):
    """Says what to train next. ``plan`` must be a pure function of its arguments and of the results sent to it."""

    def plan(self, run: RunView, options: Any) -> Plan: ...


@dataclass(frozen=True)
class RunView:
    """What a strategy knows of its run: the recipe's parts as plan words, and helpers that build and measure.

    ``model(table)`` makes a model of a table in the strategy's options, ``terms(tables)`` an objective of a list of
    them; ``measure(model)`` gives a model's :class:`ModelCost`, and ``estimate(stage)`` the FLOPs that training a stage
    takes if nothing in it stops early. A recipe is checked up to a strategy's first stage or first measure: name every
    model and loss before; then they are tried on a few samples, too, before anything is trained.
    """

    seed: int
    teacher: ModelRef
    student: ModelRef
    objective: tuple[Term, ...]
    labels: tuple[Term, ...]
    optimizer: OptimizerSpec
    data: SourceSpec
    epochs: int
    controllers: tuple[Spec, ...] = ()
    keep: Literal["last", "best"] = "last"
    teacher_epochs: int | None = None
    teacher_optimizer: OptimizerSpec | None = None
    prepare: Callable[[Spec, Stage, RunView], Stage] = lambda spec, stage, run: stage
    model: Callable[[Mapping[str, Json]], ModelRef] = lambda table: ModelRef(**table)
    measure: Callable[[ModelRef], ModelCost] = _unmeasured
    estimate: Callable[[Stage], int] = _unmeasured
    terms: Callable[[Sequence[Mapping[str, Json]]], tuple[Term, ...]] = lambda tables: tuple(
        Term(**table) for table in tables
    )
    ledger: int = 0

    def label_only(self, role: str, model: ModelRef) -> Stage:
        """A stage that trains ``model`` on labels alone; a teacher with given weights is only evaluated and stored."""
        teacher = role == "teacher"
        epochs = self.teacher_epochs if teacher and self.teacher_epochs is not None else self.epochs
        optimizer = (self.teacher_optimizer if teacher else None) or self.optimizer
        if teacher and (model.given or model.weights is not None):
            stage = self._stage(f"{model} (given)", {role: Member(model)}, 0)
        else:
            member = Member(model, terms=self.labels, optimizer=optimizer)
            stage = self._stage(f"{model} on labels", {role: member}, epochs)
        return dataclasses.replace(stage, data=dataclasses.replace(self.data, cache=self._views(teacher)))

    def distilled(self, model: ModelRef, teacher: ResultRef) -> Stage:
        """A stage that distils ``teacher`` into ``model`` by the recipe's objective, under its controllers."""
        source = _source_member(teacher)
        learner = Member(model, terms=self.objective, optimizer=self.optimizer)
        members = {"student": learner, "teacher": Member(source.model, init=teacher)}
        stage = self._stage(f"{source.model} -> {model}", members, self.epochs)
        stage = dataclasses.replace(stage, controllers=self.controllers, ledger=self.ledger)
        for spec in self.controllers:
            stage = self.prepare(spec, stage, self)
        return stage

    def _views(self, teacher: bool) -> Cache | None:
        """A control sees the augmentations that its student sees; a teacher has no outputs to wait for."""
        return None if teacher or self.data.cache is None else Cache(self.data.cache.views)

    def _stage(self, name: str, members: Mapping[str, Member], epochs: int) -> Stage:
        return Stage(name, members, self.data, epochs, seed=self.seed, keep=self.keep)


def _source_member(ref: ResultRef) -> Member:
    if isinstance(ref.stage, str):
        raise PlanError("a result of an encoded plan cannot be extended", where=f"result {ref.stage[:12]}")
    return ref.stage.members[ref.member]
