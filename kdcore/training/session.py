"""A stage at run time: everything that its loop, steps, controllers and checkpoints share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codec import decode
from ..data import Batch, Source, SourceContext, Split, Splits
from ..data.residency import fits
from ..data.source import eval_batches
from ..errors import DataError, PlanError
from ..job import Emit, Job
from ..origin import blame
from ..plan import BASE_METRICS, Json, ResultRef, Spec, Stage, check_stage
from ..registry import Catalog
from ..store import Store
from ..transforms import build_transform
from . import device as devices
from . import memory, parts
from .building import build_models, build_terms
from .cache import open_cache
from .compiled import compile_member, fuse_optimizer
from .knobs import Knobs
from .member import Learner, classifies
from .meters import Meters
from .scaling import Scaler
from .schedules import as_schedule, compile_schedule
from .step import StepContext
from .stopwatch import Stopwatch
from .world import ALONE, World

EVAL_SIZE = 512


@dataclass
class Session:
    """The state of a stage while it runs."""

    job: Job
    stage: Stage
    catalog: Catalog
    store: Store
    emit: Emit
    splits: Splits
    source: Source
    step_kind: Callable[[StepContext, Batch], None]
    device: torch.device
    learners: dict[str, Learner]
    knobs: Knobs
    controllers: list[tuple[str, Any]]
    used: Mapping[str, tuple[Mapping[str, float], ...]]
    metrics: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]]
    probe: Batch
    stopped: Callable[[], int]
    world: World = ALONE
    resident: bool = True  # training images lie on the device
    context: StepContext = field(init=False)
    stopwatch: Stopwatch = field(init=False)
    meters: Meters = field(default_factory=Meters)
    step: int = 0
    tick: int = 0
    pieces: int = 1  # of a batch, as the stage wants it; more after memory ran out
    full: int = 0  # samples of the stage's first batch; a ragged one comes last
    sizes: frozenset[int] = frozenset()  # of the pieces of this rank's part of such a batch
    seconds: float = 0.0
    finished: bool = False
    events: list[dict[str, Json]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context, self.stopwatch = StepContext(self), Stopwatch(self.device)
        self.pieces = self.stage.data.accumulate

    @property
    def seed(self) -> int:
        assert self.stage.seed is not None, "an encoded stage has its seed"
        return self.stage.seed

    @property
    def needs(self) -> frozenset[str]:
        """What the controllers asked for."""
        return frozenset().union(*(controller.needs for _, controller in self.controllers))

    @property
    def steps_per_tick(self) -> int:
        return self.source.steps_per_epoch if self.stage.tick == "epoch" else self.stage.tick

    @property
    def ticks(self) -> int:
        """Length of the stage in ticks; schedules count in them."""
        return self.stage.length if self.stage.tick == "epoch" else self.stage.length // self.stage.tick

    @property
    def epoch(self) -> float:
        """Passes over the data so far; ticks where a source has no passes."""
        passes = self.source.steps_per_epoch
        return self.step / passes if passes else float(self.tick)

    @property
    def over(self) -> bool:
        """True after the last step, or when a controller ended the stage."""
        return self.finished or self.step >= self.ticks * self.steps_per_tick

    @property
    def eval_size(self) -> int:
        """Samples of an evaluation batch, which is cut as often as the training's after memory ran out."""
        return -(-EVAL_SIZE * self.stage.data.accumulate // self.pieces)

    def evaluated(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of a split in order, in batches of ``eval_size``: see
        :func:`kdcore.data.source.eval_batches`.
        """
        if self.world.size > 1:
            split = split.take(torch.arange(len(split), device=split.labels.device)[self.world.span(len(split))])
        return eval_batches(split, self.splits, self.device, self.eval_size, self.job.settings.workers)

    def close(self) -> None:
        """Ends what the source holds, such as processes that read ahead, and lets go of its tensors: without that they
        would stay until a collection, on the device of the next stage.
        """
        if hasattr(self.source, "close"):
            self.source.close()
        del self.context
        for learner in self.learners.values():
            learner.compiled = None
        self.learners.clear()

    def autocast(self) -> torch.autocast:
        return devices.autocast(self.device, self.job.settings.precision)

    def call(self, learner: Learner, *inputs: Any) -> Tensor:
        """A member's module, compiled for the pieces of a full batch and for evaluation batches: a graph for each
        ragged size would cost more than it saves.
        """
        samples = len(inputs[0]) if inputs else 0
        whole = samples in self.sizes or samples == self.eval_size
        return learner.compiled(*inputs) if learner.compiled and whole else learner.module(*inputs)

    def meet(self, samples: int) -> None:
        """Told of every batch's samples. The stage's first batch settles what is compiled, also after a resume."""
        self.full = self.full or samples
        if not self.sizes:
            own = len(range(self.full)[self.world.span(self.full)])
            self.sizes = frozenset(memory.sizes(self, self.full, own))

    def rate(self, learner: Learner) -> float:
        """The learning rate of this step as a multiple of the optimizer's own."""
        spec = learner.spec.optimizer
        assert spec is not None
        epoch = self.step / self.steps_per_tick
        knob = float(self.knobs.values[f"{learner.name}.lr"]) / as_schedule(spec.lr).value
        return knob * learner.lr_factor(epoch, (self.step + 1) / self.steps_per_tick)

    def begin_tick(self) -> None:
        """Reads weights from knobs and schedules, and settles who is trained and who is needed."""
        for learner in self.learners.values():
            for term in learner.terms:
                knob = float(self.knobs.values[f"{learner.name}.{term.label}.weight"])
                term.weight = knob * term.factor(float(self.tick), self.tick + 1.0)
        trained = [name for name, learner in self.learners.items() if learner.live()]
        sources: dict[str, bool] = {}
        for name in trained:
            for term in self.learners[name].live():
                if term.source is not None:
                    sources[term.source] = sources.get(term.source, False) or term.spec.through
        for name, learner in self.learners.items():
            learner.thaw(name in trained)
        self.context.trained, self.context.sources = tuple(trained), sources
        parts.check_live(self)  # a loss that wants whole batches may have come alive
        if self.pieces > 1:
            self.context.across = memory.check(self, self.pieces > self.stage.data.accumulate)
        if self.stage.data.cache is not None:
            for learner in self.storable:
                learner.cached = learner.cached or open_cache(self, learner)

    @property
    def storable(self) -> list[Learner]:
        """Members that others learn from now, frozen for good and without a gradient through them."""
        apart = [self.learners[name] for name, through in self.context.sources.items() if not through]
        return [learner for learner in apart if not learner.terms]

    @property
    def taught(self) -> list[Learner]:
        """Members that have terms, be they live or not."""
        return [learner for learner in self.learners.values() if learner.terms]

    @property
    def trained(self) -> list[Learner]:
        """Members that are trained now."""
        return [self.learners[name] for name in self.context.trained]

    @property
    def taught_by(self) -> list[Learner]:
        """Frozen classifiers that a trained member learns from now."""
        frozen = [self.learners[name] for name in self.context.sources if name not in self.context.trained]
        return [learner for learner in frozen if classifies(learner.module)]


def open_session(
    job: Job,
    catalog: Catalog,
    splits: Splits,
    store: Store,
    emit: Emit,
    used: Mapping[str, Any],
    stopped: Callable[[], int] = lambda: 0,
    world: World = ALONE,
) -> Session:
    """Builds models, objectives, optimizers, source and controllers of a stage."""
    stage = decode(job.name, job.stage)
    check_stage(stage)
    device = devices.resolve(job.settings.device)
    resident = fits(splits.train.images, devices.free_memory(device))
    splits = splits.to(device) if resident else splits
    learners = build_models(stage, job.settings, catalog, store, splits, device)
    build_terms(stage, learners, catalog, splits)
    for learner in learners.values():
        _build_optimizer(stage, learner, catalog)
        if job.settings.precision == "float16" and learner.optimizer is not None:
            learner.scaler = Scaler(device)
        if job.settings.compile:
            _compile(learner)
    source, transforms = _build_source(stage, catalog, splits, device, learners, job.settings.workers, resident)
    controllers = [
        (spec.name.rpartition("/")[2], _constructed("controller", spec, catalog)) for spec in stage.controllers
    ]
    needs = frozenset().union(*(controller.needs for _, controller in controllers)) - BASE_METRICS
    return Session(
        job, stage, catalog, store, emit, splits, source, _constructed("step", stage.step, catalog), device, learners,
        Knobs(learners, [source, *transforms]), controllers, used,
        metrics={name: catalog.find("metric", name).load() for name in sorted(needs)},
        probe=_probe(stage, splits, device), stopped=stopped, world=world, resident=resident,
    )  # fmt: skip


def _build_optimizer(stage: Stage, learner: Learner, catalog: Catalog) -> None:
    adapters = [p for term in learner.terms for p in term.module.parameters()]
    learner.parameters = [p for p in [*learner.module.parameters(), *adapters] if p.requires_grad]
    spec = learner.spec.optimizer
    if spec is None or not learner.spec.terms:
        return
    entry = catalog.find("optimizer", spec.name)
    rate = as_schedule(spec.lr)
    length = stage.length if stage.tick == "epoch" else stage.length // stage.tick
    with blame(entry.origin, f"building optimizer {entry.full_name!r}"):
        optimizer = entry.load()(learner.parameters, rate.value, entry.options_class()(**spec.options))
        entry.expect(optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    learner.optimizer = optimizer
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    learner.lr_factor = compile_schedule(rate, catalog, length)


def _compile(learner: Learner) -> None:
    learner.compiled = compile_member(learner)
    if learner.optimizer is not None:
        fuse_optimizer(learner.optimizer)


def _build_source(
    stage: Stage,
    catalog: Catalog,
    splits: Splits,
    device: torch.device,
    learners: Mapping[str, Learner],
    workers: int,
    resident: bool,
) -> tuple[Source, list[Any]]:
    assert stage.seed is not None
    spec = stage.data
    transforms = [build_transform(item, catalog, splits.info) for item in spec.transforms]
    views = spec.cache.views if spec.cache is not None else 0
    context = SourceContext(
        splits.for_training,
        stage.seed,
        spec.batch_size,
        spec.drop_last,
        tuple(transforms),
        device,
        workers,
        views,
        resident,
    )
    source: Source = _constructed("source", spec.source, catalog, context)
    if stage.tick == "epoch" and stage.length:
        if source.steps_per_epoch < 1:
            fix = "Give the stage a tick and a length in steps."
            raise PlanError(f"source {spec.source.name!r} has no epochs", where=f"stage {stage.name!r}", fix=fix)
        check_batches(stage, splits, learners)
    return source, transforms


def _constructed(kind: str, spec: Spec, catalog: Catalog, *arguments: Any) -> Any:
    """A registered class with its options."""
    entry = catalog.find(kind, spec.name)
    with blame(entry.origin, f"building {kind} {entry.full_name!r}"):
        return entry.load()(entry.options_class()(**spec.options), *arguments)


def check_batches(stage: Stage, splits: Splits, learners: Mapping[str, Learner]) -> None:
    """Refuses losses that look across more samples than the smallest batch has."""
    smallest = smallest_batch(stage, splits)
    for learner in learners.values():
        for term in learner.terms:
            if smallest < getattr(term.module, "min_batch", 1):
                problem = f"a batch of {smallest} is too small for loss {term.spec.loss!r}, which looks across samples"
                raise DataError(problem, where="data.batch_size", fix="Use at least 2, and drop_last = true.")


def smallest_batch(stage: Stage, splits: Splits) -> int:
    """Samples of an epoch's smallest batch."""
    size, total = stage.data.batch_size, len(splits.train)
    return size if stage.data.drop_last else (total % size or size)


def _probe(stage: Stage, splits: Splits, device: torch.device) -> Batch:
    """The fixed monitor batch on which gradient shares are measured."""
    size = min(stage.data.batch_size, len(splits.monitor))
    inputs, target = next(iter(eval_batches(splits.monitor, splits, device, size)))
    return Batch(inputs, target, torch.arange(len(target), device=device), 0)


def curves(results: Mapping[str, Mapping[str, Any]], uses: Iterable[tuple[str, ResultRef]]) -> dict[str, Any]:
    """Curves of the results that a stage uses, by the name under which it uses them."""
    return {name: tuple(results[str(ref.stage)]["members"][ref.member]["curve"]) for name, ref in uses}
