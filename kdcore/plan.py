"""The words that strategies and controllers speak: what to train next, and what to change while it trains.

Everything here is a frozen dataclass without torch, so that a plan can be printed, hashed, journalled and tested
without training. A stage refers to the results of other stages by holding them, so a plan is a graph of plain values.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

from .errors import PlanError, suggest

Json: TypeAlias = Any
Plan: TypeAlias = "Generator[Stage | list[Stage] | Choice, Any, Outcome]"


@dataclass(frozen=True)
class Spec:
    """Something with a name in the catalog and its options (validated, JSON)."""

    name: str
    options: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRef:
    """A model by name.

    Args:
        model: its name.
        options: its own options.
        weights: a safetensors file to start from; its content is part of a stage's key.
        given: the model is built with weights that are worth something: a teacher is used as it is.
        label_map: the registered map from its classes to the data's; None where they are the same.
    """

    model: str
    options: Mapping[str, Json] = field(default_factory=dict)
    weights: str | None = None
    given: bool = False
    label_map: Spec | None = None

    def __str__(self) -> str:
        name, size = self.model.rpartition("/")[2], self.options.get("size")
        return name if size is None else f"{name}-{size}"


@dataclass(frozen=True)
class Schedule:
    """``value`` x warm-up x a registered schedule's factor.

    ``warmup_epochs`` is a linear ramp: min(e / warmup_epochs, 1), e counted from 1.
    """

    value: float = 1.0
    warmup_epochs: float = 0.0
    shape: Spec = Spec("constant")


@dataclass(frozen=True)
class Term:
    """One summand of a member's objective.

    Args:
        loss: name of a registered loss.
        source: the member it learns from; None for a loss on labels alone.
        weight: factor of the loss; 0 means that neither the loss nor, if nothing else names it, its source is computed.
        options: the loss's own options.
        name: how knobs and curves call it; default: the loss's short name.
        through: keep the source's graph, so that a gradient can flow through it (generators, mutual learning).
    """

    loss: str
    source: str | None = "teacher"
    weight: float | Schedule = 1.0
    options: Mapping[str, Json] = field(default_factory=dict)
    name: str = ""
    through: bool = False

    @property
    def label(self) -> str:
        return self.name or self.loss.rpartition("/")[2]


@dataclass(frozen=True)
class OptimizerSpec:
    """How a member is updated: optimizer name and options, learning-rate schedule, gradient-norm clipping, and the
    decay of the moving average of its weights, of a member that names none itself.
    """

    name: str = "sgd"
    lr: float | Schedule = 0.05
    options: Mapping[str, Json] = field(default_factory=dict)
    clip: float | None = None
    ema: float | None = None


@dataclass(frozen=True)
class Cache:
    """Frozen members run once over the training split, and their outputs are read in every epoch.

    Args:
        views: augmentations repeat after so many epochs, and there are outputs for each.
        top: how many logits of a sample are stored, the largest, with the log-sum-exp of the others; 0 for all.
    """

    views: int = 1
    top: int = 0


@dataclass(frozen=True)
class SourceSpec:
    """Where batches come from.

    Args:
        dataset: name and options of a registered data set.
        batch_size: samples a step.
        monitor: share of the training data that is held out for every decision.
        split_seed: seed of that split; not the run's, so that seeds share it.
        drop_last: leave out a ragged last batch (class statistics want full ones).
        transforms: augmentations, in order.
        source: the registered source; ``epochs`` shuffles the training split.
        cache: how outputs of frozen members are stored; None to run them on every batch, augmented anew every epoch.
        accumulate: in how many pieces a batch is trained, with one update; 1 for whole batches.
    """

    dataset: Spec
    batch_size: int = 128
    monitor: float = 0.1
    split_seed: int = 0
    drop_last: bool = False
    transforms: tuple[Spec, ...] = ()
    source: Spec = Spec("epochs")
    cache: Cache | None = None
    accumulate: int = 1


@dataclass(frozen=True)
class ResultRef:
    """A member of another stage's result. ``stage`` is that stage, or its key once a plan is encoded."""

    stage: Stage | str
    member: str


@dataclass(frozen=True)
class Member:
    """A model in a stage. Without a term of non-zero weight it is frozen, and runs only while a live term names it."""

    model: ModelRef
    init: ResultRef | None = None
    terms: tuple[Term, ...] = ()
    optimizer: OptimizerSpec | None = None
    ema: float | None = None

    @property
    def decay(self) -> float | None:
        """Of the moving average of its weights, which is then what is evaluated and delivered; None without one."""
        return self.ema if self.ema is not None or self.optimizer is None else self.optimizer.ema


@dataclass(frozen=True, eq=False)
class Stage:
    """Several members trained on the same batches.

    Args:
        name: for people; not part of the key, so equal stages share one result.
        members: role -> member. Random numbers depend on seed and role, never on the stage.
        data: where batches come from.
        length: epochs, or steps if ``tick`` is a number. 0 evaluates and stores the members as they are.
        tick: how often controllers decide: every epoch, or every n steps.
        controllers: by name; all see the same view, in this order.
        uses: results that controllers read, e.g. the curve of a control.
        step: the registered kind of step, with its options.
        seed: None for the run's.
        keep: whether a member's result is its last weights or those best on the monitor split.
        ledger: every n steps, norms and cosines of the terms' gradients at the logits are recorded; 0 for never.
        diverged: what becomes of a member whose loss or weights are not finite: the stage stops with an error, or the
            member, if nobody learns from it, is dropped with a warning, and has neither accuracy nor weights.
    """

    name: str
    members: Mapping[str, Member]
    data: SourceSpec
    length: int
    tick: int | Literal["epoch"] = "epoch"
    controllers: tuple[Spec, ...] = ()
    uses: Mapping[str, ResultRef] = field(default_factory=dict)
    step: Spec = Spec("distill")
    seed: int | None = None
    keep: Literal["last", "best"] = "last"
    ledger: int = 0
    diverged: Literal["stop", "drop"] = "stop"

    def __getitem__(self, member: str) -> ResultRef:
        """The member's result; of one that is only used here, the result that it came from."""
        if member not in self.members:
            raise PlanError(f"no member {member!r}", where=f"stage {self.name!r}", fix=suggest(member, self.members))
        found = self.members[member]
        return found.init if found.init is not None and not found.terms else ResultRef(self, member)

    @cached_property
    def identity(self) -> str:
        """Equal for stages that ask for the same training, whatever they are called; keys add code and data to it."""
        from .codec import digest, encode  # which knows these words

        return digest(encode(self, lambda stage: stage.identity))

    def inputs(self) -> Iterator[ResultRef]:
        """Every result that this stage needs before it can start."""
        yield from (m.init for m in self.members.values() if m.init is not None)
        yield from self.uses.values()


def check_stage(stage: Stage) -> None:
    """Refuses a stage whose words do not fit together.

    Raises:
        PlanError: names the member and what to write.
    """
    where = f"stage {stage.name!r}"
    if not stage.members or stage.length < 0 or stage.ledger < 0:
        raise PlanError("a stage has members, and a length and a ledger from 0", where=where)
    if not 1 <= stage.data.accumulate <= stage.data.batch_size:
        what = f"a batch of {stage.data.batch_size} in {stage.data.accumulate} pieces"
        raise PlanError(what, where=f"{where}, accumulate", fix=f"Use 1 to {stage.data.batch_size}.")
    if stage.tick != "epoch" and (stage.tick < 1 or stage.length % stage.tick):
        raise PlanError(f"length {stage.length} is not a multiple of tick {stage.tick}", where=where)
    if stage.diverged == "drop" and stage.controllers:
        raise PlanError(
            "a controller may rely on a member that diverges", where=f"{where}, diverged", fix='Say "stop".'
        )
    for name, member in stage.members.items():
        labels = [term.label for term in member.terms]
        if len(set(labels)) < len(labels):
            raise PlanError(f"terms {labels}", where=f"{where}, member {name!r}", fix="Give each term its own name.")
        if any(set(text) & set("./\\\0") for text in (name, *labels)) or name == "data":  # names become file names
            raise PlanError("names hold no dot and no slash, and data is taken", where=f"{where}, member {name!r}")
        if member.terms and member.optimizer is None:
            raise PlanError("has terms but no optimizer", where=f"{where}, member {name!r}")
        for term in member.terms:
            if term.source is not None and term.source not in stage.members:
                fix = suggest(term.source, stage.members)
                raise PlanError(f"no member {term.source!r}", where=f"{where}, {name}.{term.label}.source", fix=fix)


@dataclass(frozen=True)
class Set:
    """Sets a knob: ``student.kd.weight``, ``student.kd.source``, ``student.kd.temperature``, ``data.difficulty``."""

    knob: str
    value: Json
    reason: str = ""


@dataclass(frozen=True)
class Drop:
    """Ends a member's training and evaluation; its last weights stay in the result."""

    member: str
    reason: str = ""


@dataclass(frozen=True)
class Finish:
    """Ends the stage after this tick."""

    reason: str


Decision: TypeAlias = Set | Drop | Finish


@dataclass(frozen=True)
class MemberResult:
    """What a stage says of one member. Accuracies are shares of the *monitor* split: a strategy never sees the test
    split, so it cannot select on it.

    Args:
        ref: the member.
        accuracy: of the weights that are delivered.
        best_accuracy: of those that were best.
        curve: one mapping a tick.
        params: number of parameters.
        flops: of one image forward.
        correct: a byte for each monitor image, 1 where the delivered weights are right, else 0; empty where that is not
            known. See :func:`kdcore.paired_difference`.
        diverged: it was dropped, since its loss or weights were not finite; it has no accuracy (NaN) and no weights.
    """

    ref: ResultRef
    accuracy: float
    best_accuracy: float
    curve: tuple[Mapping[str, float], ...]
    params: int
    flops: int
    correct: bytes = b""
    diverged: bool = False


@dataclass(frozen=True)
class Result:
    """A finished stage: its members, events (decisions with reasons) and recorded cost."""

    stage: Stage
    key: str
    members: Mapping[str, MemberResult]
    events: tuple[Mapping[str, Json], ...]
    seconds: float
    flops: int

    def __getitem__(self, member: str) -> MemberResult:
        return self.members[member]


@dataclass(frozen=True)
class Choice:
    """A strategy's decision between results. It is yielded, and shown, journalled and reported; None is sent back.

    Args:
        text: what was decided, e.g. "10-4-2 instead of 10-2".
        best: the student to deliver if the run ended now.
        margin: how much better the chosen one is, a difference of shares of the monitor split; None or NaN if unknown.
        error: standard error of the margin; None or NaN if unknown.
    """

    text: str
    best: ResultRef
    margin: float | None = None
    error: float | None = None

    @property
    def is_noise(self) -> bool:
        """The margin is within its standard error, or is that but for last digits."""
        if self.margin is None or self.error is None:
            return False
        return abs(self.margin) <= self.error or math.isclose(abs(self.margin), self.error)


@dataclass(frozen=True)
class Outcome:
    """What a strategy returns.

    Args:
        student: the one to deliver.
        teacher: what it is compared with; default: the first of the chain that leads to it.
        evidence: numbers for the report.
        note: a sentence for the report.
        replicates: name -> the same learner under several seeds, for means and spreads; the student's name first.
    """

    student: ResultRef
    teacher: ResultRef | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    replicates: Mapping[str, tuple[ResultRef, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TickView:
    """What a controller sees: plain numbers of this tick and of the ones before.

    Args:
        tick: from 1.
        epoch: passes over the data so far.
        step: steps so far.
        length: ticks of the whole stage.
        curves: member -> one mapping a tick at which it was trained or taught, with its ``tick``, ``accuracy`` and
            ``loss`` on the monitor split, and what was asked for.
        used: name -> curve of the result that the stage uses under that name.
        knobs: the current value of every knob.
    """

    tick: int
    epoch: float
    step: int
    length: int
    curves: Mapping[str, tuple[Mapping[str, float], ...]]
    used: Mapping[str, tuple[Mapping[str, float], ...]]
    knobs: Mapping[str, Json]

    def now(self, member: str, metric: str = "accuracy") -> float | None:
        """The metric of a member of this stage, or of a used result at the same tick; None where there is none."""
        curve = self.curves.get(member) or self.used.get(member, ())
        return next((row.get(metric) for row in reversed(curve) if row["tick"] == self.tick), None)


def labels_alone(view: TickView, member: str, reason: str, weight: float = 1.0) -> list[Decision]:
    """Decisions that end a member's distillation: every term with a source goes to weight 0, its first label term to
    ``weight``, the others in proportion. The sources then no longer run. None where all that is so already: of two
    rules in a stage, the one that stops first has said it.
    """
    knobs = {knob: value for knob, value in view.knobs.items() if knob.startswith(f"{member}.")}
    terms = {knob.removesuffix(".source"): value for knob, value in knobs.items() if knob.endswith(".source")}
    labels = [term for term, source in terms.items() if source is None]
    first = float(knobs[f"{labels[0]}.weight"]) if labels else 0.0
    found = [Set(f"{term}.weight", 0.0, reason) for term in terms if term not in labels]
    for term in labels:
        own = float(knobs[f"{term}.weight"])
        found.append(Set(f"{term}.weight", weight * own / first if first else weight, reason))
    return [*found] if any(view.knobs[decision.knob] != decision.value for decision in found) else []


BASE_METRICS = frozenset({"accuracy", "loss", "grad_norm", "grad_cosine"})
"""What every tick measures anyway; other names in a controller's ``needs`` are registered metrics."""


class Controller(Protocol):
    """Decides at every tick of a stage. Constructed with its validated options."""

    needs: frozenset[str]

    def decide(self, view: TickView) -> Iterable[Decision]: ...
    def state_dict(self) -> dict[str, Json]: ...
    def load_state_dict(self, state: Mapping[str, Json]) -> None: ...
