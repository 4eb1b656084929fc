"""A stage at run time: everything that its loop, steps, controllers and checkpoints share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..codec import decode
from ..data import Batch, Source, SourceContext, Split, Splits
from ..data.source import eval_batches
from ..errors import DataError, PlanError
from ..job import Emit, Job, Settings
from ..options import Options
from ..origin import blame
from ..outputs import Shapes
from ..plan import BASE_METRICS, Json, ResultRef, Spec, Stage, Term, check_stage
from ..registry import Catalog
from ..seeds import derive
from ..store import Store
from ..transforms import build_transform
from . import device as devices
from . import memory
from .adapters import adapter_builder
from .knobs import Knobs
from .member import Learner, LiveTerm, Tapped, build_model, classifies, load_weights, make_ema, tap_names
from .meters import Meters
from .schedules import as_schedule, compile_schedule
from .step import StepContext
from .stopwatch import Stopwatch

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
    context: StepContext = field(init=False)
    stopwatch: Stopwatch = field(init=False)
    meters: Meters = field(default_factory=Meters)
    step: int = 0
    tick: int = 0
    pieces: int = 1  # of a batch; more after memory ran out
    seconds: float = 0.0
    finished: bool = False
    events: list[dict[str, Json]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context, self.stopwatch = StepContext(self), Stopwatch(self.device)

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
        """Samples of an evaluation batch, which is cut as often as the training's."""
        return -(-EVAL_SIZE // self.pieces)

    def evaluated(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order, in batches of ``eval_size``: see :func:`kdcore.data.source.eval_batches`."""
        return eval_batches(split, self.splits, self.device, self.eval_size, self.job.settings.workers)

    def close(self) -> None:
        """Ends what the source holds, such as processes that read ahead."""
        if hasattr(self.source, "close"):
            self.source.close()

    def autocast(self) -> torch.autocast:
        return devices.autocast(self.device, self.job.settings.precision)

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
        if self.pieces > 1:
            memory.check(self)  # a loss that wants whole batches may have come alive

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
    job: Job, catalog: Catalog, splits: Splits, store: Store, emit: Emit, used: Mapping[str, Any]
) -> Session:
    """Builds models, objectives, optimizers, source and controllers of a stage."""
    stage = decode(job.name, job.stage)
    check_stage(stage)
    device = devices.resolve(job.settings.device)
    splits = splits.to(device)
    learners = build_models(stage, job.settings, catalog, store, splits, device)
    build_terms(stage, learners, catalog, splits)
    for learner in learners.values():
        _build_optimizer(stage, learner, catalog)
    source, transforms = _build_source(stage, catalog, splits, device, learners, job.settings.workers)
    controllers = [
        (spec.name.rpartition("/")[2], _constructed("controller", spec, catalog)) for spec in stage.controllers
    ]
    needs = frozenset().union(*(controller.needs for _, controller in controllers)) - BASE_METRICS
    return Session(
        job, stage, catalog, store, emit, splits, source, _constructed("step", stage.step, catalog), device, learners,
        Knobs(learners, [source, *transforms]), controllers, used,
        metrics={name: catalog.find("metric", name).load() for name in sorted(needs)},
        probe=_probe(stage, splits, device),
    )  # fmt: skip


def build_models(
    stage: Stage, settings: Settings, catalog: Catalog, store: Store, splits: Splits, device: torch.device
) -> dict[str, Learner]:
    """The members of a stage with their initial weights, without terms."""
    learners = {}
    for name, member in stage.members.items():
        assert stage.seed is not None
        module = build_model(member.model, catalog, splits.info, stage.seed)
        if isinstance(member.init, ResultRef):
            load_weights(module, store.weights(str(member.init.stage), member.init.member), f"member {name!r}")
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        module = module.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        learners[name] = Learner(name, member, module)
    return learners


def build_terms(stage: Stage, learners: Mapping[str, Learner], catalog: Catalog, splits: Splits) -> None:
    """Finds the taps that the learners' terms ask for, and builds the terms for their shapes."""
    asked = {
        name: [_taps(term, learner, learners, catalog) for term in learner.spec.terms]
        for name, learner in learners.items()
    }
    for name, learner in learners.items():
        if learner.spec.ema is not None:
            learner.ema = make_ema(learner.module, learner.spec.ema)  # before hooks, which it would copy
        wanted = {tap for own, _ in asked[name] for tap in own} | _asked_of(name, learners, asked)
        if wanted:
            learner.tapped = Tapped(learner.module, frozenset(wanted))
    shapes = {name: _tap_shapes(learner, splits) for name, learner in learners.items()}
    length = stage.length if stage.tick == "epoch" else stage.length // stage.tick
    for name, learner in learners.items():
        for term, (own, other) in zip(learner.spec.terms, asked[name], strict=True):
            source = None if term.source is None else learners[term.source]
            info = Shapes(
                splits.info.classes,
                len(splits.train),
                {tap: shapes[name][tap] for tap in own},
                {} if source is None else {tap: shapes[source.name][tap] for tap in other},
                splits.train.labels,
                {} if source is None else _norms(source.module, other),
            )
            learner.terms.append(_build_term(term, info, catalog, length, stage, name))
            learner.terms[-1].module.to(next(learner.module.parameters()).device)


def _taps(
    term: Term, learner: Learner, learners: Mapping[str, Learner], catalog: Catalog
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The taps that a term needs of its learner and of its source."""
    entry = catalog.find("loss", term.loss)
    cls = entry.load()
    if "taps" not in cls.needs:
        return (), ()
    options = entry.options_class()(**term.options)
    own, other = cls.taps(options)
    student = _fitting(learner, own, options, "student")
    return student, () if term.source is None else _fitting(learners[term.source], other, options, "teacher")


def _fitting(learner: Learner, patterns: Iterable[str], options: Options, key: str) -> tuple[str, ...]:
    key = key if hasattr(options, key) else ""  # a loss may fix its taps
    return tap_names(learner.module, patterns, f"{learner.name} {learner.spec.model}", key)


def _asked_of(name: str, learners: Mapping[str, Learner], asked: Mapping[str, list[Any]]) -> set[str]:
    """The taps that other members' terms need of a source."""
    terms = [
        (term, taps)
        for key, learner in learners.items()
        for term, taps in zip(learner.spec.terms, asked[key], strict=True)
    ]
    return {tap for term, (_, other) in terms if term.source == name for tap in other}


def _norms(module: nn.Module, taps: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of the batch norms that a model names for these taps."""
    paths: Mapping[str, str] = getattr(module, "norms", {})
    found = {tap: dict(module.get_submodule(paths[tap]).named_parameters()) for tap in taps if tap in paths}
    return {tap: (norm["weight"].detach(), norm["bias"].detach()) for tap, norm in found.items()}


def _tap_shapes(learner: Learner, splits: Splits) -> dict[str, tuple[int, ...]]:
    if learner.tapped is None:
        return {}
    images = torch.zeros(2, *splits.info.shape, device=next(learner.module.parameters()).device)
    with torch.no_grad():
        learner.module.eval()(images)
    return {name: tuple(tap.shape[1:]) for name, tap in learner.tapped.taps.items()}


def _build_term(term: Term, info: Shapes, catalog: Catalog, length: int, stage: Stage, member: str) -> LiveTerm:
    entry = catalog.find("loss", term.loss)
    with blame(entry.origin, f"building loss {entry.full_name!r}"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_adapter_seed(stage, member, term))
        options = entry.options_class()(**term.options)
        info = replace(info, adapter=adapter_builder(options, catalog))
        module: nn.Module = entry.load().build(info, options)
        entry.expect(module, nn.Module, "an nn.Module")
    if term.through and hasattr(module, "teacher_grad"):
        module.teacher_grad = True  # type: ignore[assignment]
    return LiveTerm(
        term, module, entry.options_class(), compile_schedule(as_schedule(term.weight), catalog, length), term.source
    )


def _adapter_seed(stage: Stage, member: str, term: Term) -> int:
    assert stage.seed is not None
    return derive(stage.seed, "adapter", member, term.label)


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


def _build_source(
    stage: Stage,
    catalog: Catalog,
    splits: Splits,
    device: torch.device,
    learners: Mapping[str, Learner],
    workers: int,
) -> tuple[Source, list[Any]]:
    assert stage.seed is not None
    spec = stage.data
    transforms = [build_transform(item, catalog, splits.info) for item in spec.transforms]
    context = SourceContext(
        splits.for_training, stage.seed, spec.batch_size, spec.drop_last, tuple(transforms), device, workers
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
