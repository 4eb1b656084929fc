"""Does a stage fit into the device's memory? Two updates of it tell, and an evaluation batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from ..codec import decode
from ..data import Splits
from ..data.loading import lost
from ..job import Job
from ..plan import Cache
from ..registry import Catalog
from ..store import Store
from . import device, evaluate, memory
from .cache import resident_bytes
from .loop import take_step
from .member import classifies
from .scaling import ENDLESS
from .session import Session, open_session
from .world import World

SPARE = 0.1
"""Of the free memory that stays free: fragments want some."""
UPDATES = 2  # the second one has the optimizer's state


def fits(job: Job, catalog: Catalog, load: Callable[[Any], Splits], cache: Cache | None = None) -> bool:
    """True if updates and evaluation of a stage leave a tenth of the free memory.

    Args:
        job: the stage, without a cache; its members take nothing from the store. Of several ranks, one part of its
            batches is trained, the others are not asked, and the copy of gradients that would go to them is added.
        catalog: where its names are found.
        load: gives the splits of a :class:`kdcore.SourceSpec`.
        cache: the cache that the stage will have. Here its teacher runs live all the same, and what would lie on the
            device of its outputs is added: an upper bound.
    """
    place = device.resolve(job.settings.device)
    free, peak = device.free_memory(place), device.watched_memory(place)
    try:
        with device.sandbox(place, job.settings.threads):
            more = _train(job, catalog, load, cache)
    except (RuntimeError, MemoryError) as error:
        if died := lost(error):
            raise died from error
        if not memory.is_exhausted(error):
            raise
        return False
    finally:
        memory.release()
    return free is None or peak() + more <= (1 - SPARE) * free


def _train(job: Job, catalog: Catalog, load: Callable[[Any], Splits], cache: Cache | None) -> int:
    """Makes the updates and evaluates; bytes that the cache and a message of gradients would have on the device."""
    store, world, updates = Store(job.settings.store), World(0, job.settings.world_size), 0
    session = open_session(job, catalog, load(decode(job.name, job.stage).data), store, lambda event: None, {})
    with closing(session):
        session.begin_tick()
        while updates < UPDATES and session.step < ENDLESS - 1:
            take_step(session, world)
            # a scale that is too large is found by updates that are left out, and make no state
            updates += not any(learner.scaler and learner.scaler.row for learner in session.trained)
        _evaluate(session)
        return (0 if cache is None else resident_bytes(session, cache)) + _message(session, world)


def _evaluate(session: Session) -> None:
    """One batch of the monitor split, by each classifier."""
    split = session.splits.monitor
    batch = split.take(torch.arange(min(session.eval_size, len(split)), device=split.labels.device))
    for learner in session.learners.values():
        if classifies(learner.module):
            evaluate.accuracy(session, learner.evaluated, batch)


def _message(session: Session, world: World) -> int:
    """Bytes of the largest copy of a member's gradients that goes to other ranks."""
    sizes = [sum(parameter.nbytes for parameter in learner.parameters) for learner in session.trained]
    return max(sizes, default=0) if world.size > 1 else 0
