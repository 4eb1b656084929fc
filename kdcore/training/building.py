"""The members of a stage: models with their weights and taps, and the terms of their objectives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Splits
from ..job import Settings
from ..options import Options
from ..origin import blame
from ..outputs import Shapes
from ..plan import ResultRef, Stage, Term
from ..registry import Catalog
from ..seeds import derive
from ..store import Store
from .adapters import adapter_builder
from .ema import Average
from .member import Learner, LiveTerm, Tapped, build_model, load_weights, tap_names
from .schedules import as_schedule, compile_schedule


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
        if learner.spec.decay is not None:
            learner.ema = Average(learner.module, learner.spec.decay)  # before hooks, which it would copy
        wanted = {tap for own, _ in asked[name] for tap in own} | _asked_of(name, learners, asked)
        if wanted:
            learner.tapped = Tapped(learner.module, frozenset(wanted))
    shapes = {name: _tap_shapes(learner, splits) for name, learner in learners.items()}
    length = stage.length if stage.tick == "epoch" else stage.length // stage.tick
    for name, learner in learners.items():
        for term, (own, other) in zip(learner.spec.terms, asked[name], strict=True):
            source = None if term.source is None else learners[term.source]
            device = next(learner.module.parameters()).device
            info = Shapes(
                splits.info.classes,
                len(splits.train),
                {tap: shapes[name][tap] for tap in own},
                {} if source is None else {tap: shapes[source.name][tap] for tap in other},
                splits.train.labels.to(device),
                {} if source is None else _norms(source.module, other),
            )
            learner.terms.append(_build_term(term, info, catalog, length, stage, name))
            learner.terms[-1].module.to(device)


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
