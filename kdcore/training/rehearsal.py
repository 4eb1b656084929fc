"""What only models can show, found before hours of training: taps, shapes, adapters, batches, a loss's first call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..data import Batch, SourceContext, Splits
from ..data.loading import lost
from ..data.source import EpochSource
from ..errors import KdError
from ..generators import kept
from ..job import Settings
from ..named import Names, Objective
from ..options import Options
from ..outputs import Outputs
from ..plan import Member, Stage, Term
from ..registry import Catalog
from ..store import Store
from ..transforms import build_transform
from . import memory, parts
from .building import build_models, build_terms
from .cache import check_knobs, check_source, check_views, views_of
from .device import autocast, sandbox
from .member import Learner, LiveTerm, Tapped, classifies
from .objective import weighted_loss
from .session import check_batches, smallest_batch

CPU = torch.device("cpu")
EPOCHS = "core/epochs"
FEW = 8
"""Training samples that a rehearsal takes, if no loss looks across more."""


def rehearse(names: Names, catalog: Catalog, splits: Splits, store: Store, settings: Settings) -> None:
    """Computes every objective and its gradient once, on a few training samples, between models on the CPU.

    Models that a strategy made learn from the teacher, and teach the student. Weights are random but for those that are
    given. Random state, threads and data stay as they are; what does not fit into the host's memory is left alone.

    Raises:
        KdError: what training would raise, with its place in the recipe before where it arose.
    """
    view = names.view
    pairs = [("", view.student, view.teacher)]
    for number, (place, model) in enumerate(names.models):
        if model not in [other for _, other in names.models[:number]]:
            pairs += [(place, model, view.teacher), (place, view.student, model)]
    with kept(), sandbox(CPU, settings.threads):
        room = Room(catalog, splits, store, settings)
        for place, student, teacher in pairs:
            members = {"student": Member(student), "teacher": Member(teacher)}
            stage = Stage("rehearsal", members, view.data, view.epochs, seed=view.seed)
            try:
                with _at(place):
                    room.rehearse(stage, names.objectives if not place else names.objectives[:1])
            except (RuntimeError, MemoryError) as error:
                if died := lost(error):
                    raise died from error
                if not memory.is_exhausted(error):
                    raise


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Says in an error which part of the recipe it concerns; its class stays."""
    try:
        yield
    except KdError as error:
        error.where = ", ".join(filter(None, (place, error.where)))
        raise
    except Exception as error:
        if place:
            error.add_note(f"{place}: tried before anything is trained")
        raise


@dataclass(frozen=True)
class Room:
    """What rehearsals of a run share."""

    catalog: Catalog
    splits: Splits
    store: Store
    settings: Settings

    def rehearse(self, stage: Stage, objectives: Iterable[Objective]) -> None:
        """Tries the objectives between the stage's student and its teacher; what was tried once is not tried again."""
        models: dict[str, Learner] = {}
        for name, member in stage.members.items():
            with _at(name):
                alone = replace(stage, members={name: member})
                models |= build_models(alone, self.settings, self.catalog, self.store, self.splits, CPU)
        if not all(classifies(learner.module) for learner in models.values()):
            return
        cast = Cast(stage, models, [], {"student": [], "teacher": []})
        built = [(objective, self._build(objective, cast)) for objective in objectives]
        models["student"].terms = [term for _, terms in built for term in terms]
        self._check_modes(stage, built)
        if stage.data.source.name != EPOCHS:  # its batches may be of another kind
            return
        check_batches(stage, self.splits, models)
        batch = self._batch(stage, models["student"].terms)
        own, other = (cast.outputs(name, batch, self.settings.precision) for name in ("student", "teacher"))
        for objective, terms in built:
            if terms:
                with _at(objective.place):
                    total = weighted_loss(terms, own, {"teacher": other}, batch, lambda label, value: None)
                    if total.requires_grad:
                        total.backward(retain_graph=True)  # type: ignore[no-untyped-call]

    def _check_modes(self, stage: Stage, built: Iterable[tuple[Objective, list[LiveTerm]]]) -> None:
        """Refuses objectives and sources that pieces of a batch, several ranks, or a cache would give another sense."""
        data, ranks = stage.data, self.settings.world_size
        for objective, terms in built:
            live = [term for term in terms if term.spec.weight != 0]
            with _at(objective.place):
                if data.accumulate > 1:
                    memory.check_objective(live)
                if ranks > 1:
                    parts.check_objective(live, ranks)
        if data.cache is not None:
            check_source(self.catalog.find("source", data.source.name).load(), data.source.name)

    def _build(self, objective: Objective, cast: Cast) -> list[LiveTerm]:
        """Its terms, each for the shapes of the taps that it asks for; none if every one of them was built before."""
        if all(_what(term) in cast.known for term in objective.terms):
            return []
        terms = []
        for term, place in zip(objective.terms, objective.places, strict=True):
            with _at(f"{place} ({term.label})"):
                terms.append(cast.build(term, self.catalog, self.splits))
        return terms

    def _batch(self, stage: Stage, terms: Iterable[LiveTerm]) -> Batch:
        """A few training samples, augmented."""
        wanted = max([FEW, *(getattr(term.module, "min_batch", 1) for term in terms)])
        size, data = min(smallest_batch(stage, self.splits), wanted), self.splits.for_training
        transforms = tuple(build_transform(spec, self.catalog, self.splits.info) for spec in stage.data.transforms)
        assert stage.seed is not None
        workers = min(self.settings.workers, 1)  # reading in a process of its own where training does
        source = EpochSource(Options(), SourceContext(data, stage.seed, size, False, transforms, CPU, workers))
        try:
            if stage.data.cache is not None:
                check_knobs(getattr(part, "knobs", {}) for part in (source, *transforms))
                check_views(source, data.split, views_of(stage, stage.data.cache), CPU)
            return source.batch(0)
        finally:
            source.close()


@dataclass(frozen=True)
class Cast:
    """Two members, and what was built for them so far.

    Args:
        stage: that they are of.
        models: by name.
        known: terms that were built, without weights and names.
        tapped: collected features of each member.
    """

    stage: Stage
    models: dict[str, Learner]
    known: list[Term]
    tapped: dict[str, list[Tapped]]

    def build(self, term: Term, catalog: Catalog, splits: Splits) -> LiveTerm:
        """The term alone, at weight 1."""
        learners = {name: Learner(name, model.spec, model.module) for name, model in self.models.items()}
        learners["student"].spec = replace(learners["student"].spec, terms=(term,))
        build_terms(self.stage, learners, catalog, splits)
        for name, learner in learners.items():
            self.tapped[name] += [] if learner.tapped is None else [learner.tapped]
        self.known.append(_what(term))
        live = learners["student"].terms[0]
        live.weight = 1.0
        return live

    def outputs(self, name: str, batch: Batch, precision: str) -> Outputs:
        """Of the student in training mode with its graph, of the teacher as a frozen member."""
        learner, trained = self.models[name], name == "student"
        learner.thaw(trained)
        with _at(name), torch.set_grad_enabled(trained), autocast(CPU, precision):
            logits = learner.module(batch.inputs)
        return Outputs(logits, {tap: value for tapped in self.tapped[name] for tap, value in tapped.taps.items()})


def _what(term: Term) -> Term:
    """What decides whether a term fits two models."""
    return replace(term, weight=1.0, name="")
