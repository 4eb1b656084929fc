"""The loop of one stage: steps, ticks, decisions, checkpoints, and the result at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..codec import decode
from ..data import Batch, Splits
from ..data.loading import lost
from ..errors import Interrupted, NumericError, PlanError, PluginError, suggest
from ..job import Emit, Job
from ..plan import Decision, Drop, Json, Set, TickView
from ..registry import Catalog
from ..store import Store
from ..stored import check_stored
from . import device, evaluate, memory, parts, state
from .compiled import fresh_graphs
from .finite import check_finite, diverge
from .member import Learner, classifies, host_state
from .preflight import preflight
from .result import finish
from .session import Session, curves, open_session
from .world import ALONE, World


def run_stage(
    job: Job,
    catalog: Catalog,
    load: Callable[[Any], Splits],
    store: Store,
    emit: Emit,
    stopped: Callable[[], int] = lambda: 0,
    world: World | None = None,
) -> dict[str, Any]:
    """Trains a stage, or goes on with it, and commits its result.

    Args:
        job: the stage under its key, which the caller holds a lease on.
        catalog: where its names are found.
        load: gives the splits of a :class:`kdcore.SourceSpec`.
        store: results that it needs, its checkpoints, its result.
        emit: told of progress, ticks, decisions, warnings and checkpoints.
        stopped: a signal number if the process was asked to stop, else 0; read after every step.
        world: the processes that call this with the same job at the same time; rank 0 decides and writes.

    Returns:
        The content of the result's result.json.

    Raises:
        Interrupted: after a checkpoint.
        NumericError, DataError, PlanError, DeviceError, StorageError: what their names say; the last checkpoint stays.
    """
    place = device.resolve(job.settings.device)
    with device.sandbox(place, job.settings.threads), fresh_graphs(job.settings.compile):
        stage = decode(job.name, job.stage)
        inputs = {key: _needed(store, key, world or ALONE) for key in job.needs}
        used = curves(inputs, stage.uses.items())
        again: memory.Again | None = None
        while True:
            opened = partial(open_session, job, catalog, load(stage.data), store, emit, used, stopped, world or ALONE)
            found = _attempt(opened, job, catalog, inputs, again)
            if not isinstance(found, memory.Again):
                return found
            again = found
            memory.release()


def _attempt(
    opened: Callable[[], Session],
    job: Job,
    catalog: Catalog,
    inputs: Mapping[str, Any],
    again: memory.Again | None,
) -> dict[str, Any] | memory.Again:
    """The result, or the next try if memory ran out; nothing that this one held outlives it."""
    session: Session | None = None
    try:
        session = opened()
        _train(session, inputs, again)
        return finish(session)
    except (RuntimeError, MemoryError) as error:
        if died := lost(error):
            raise died from error
        if not memory.is_exhausted(error):
            raise
        return memory.next_try(job, catalog, session, error)
    finally:
        if session is not None:
            session.close()


def _needed(store: Store, key: str, world: World) -> dict[str, Any]:
    if not world.leads:
        world.see(store.root / "results" / key)
    found = store.result(key)
    if found is None:
        raise PlanError(f"the result {key[:12]} that it needs is not in the store", where="job")
    return check_stored(found, key)


def _train(session: Session, inputs: Mapping[str, Any], again: memory.Again | None) -> None:
    _begin(session, inputs, again)
    clock, first = Clock(session), session.step + 1
    session.begin_tick()
    clock.speed()  # from here on
    while not session.over:
        _step(session)
        if session.step == first:
            parts.check(session)
        if session.step % session.steps_per_tick == 0:
            try:
                _tick(session, clock)
            except Interrupted:  # while a teacher's outputs were computed
                clock.checkpoint()
                raise
        elif session.step % session.job.settings.log_every == 0:
            _log(session, clock)
        if session.over:
            break
        if signal := clock.signal(session.stopped):
            _log(session, clock)
            clock.checkpoint()
            raise Interrupted(signal)
        clock.checkpoint_if_due()
    clock.stop()


def _begin(session: Session, inputs: Mapping[str, Any], again: memory.Again | None) -> None:
    """Goes on from the newest checkpoint, or checks the teachers before the first step."""
    folder = _checkpoint(session)
    if folder is not None:
        state.unpack(session, folder)
    parts.check(session)
    if again is not None:
        memory.begin(session, again)
    if folder is None:
        check_finite(session, session.learners.values())  # given weights may be anybody's
        session.warnings += preflight(session, inputs) + parts.warnings(session)
    for text in session.warnings:
        session.emit({"kind": "warning", "text": text, "preflight": True})
    ticks = {"tick": session.tick, "ticks": session.ticks, "every": session.stage.tick, "step": session.step}
    session.emit({"kind": "stage_started", **ticks, "events": list(session.events)})
    images = session.splits.train.images
    if not session.resident and isinstance(images, Tensor):
        size = images.nbytes / 2**30
        text = f"training images ({size:.1f} GiB) are more than half of the free memory: they stay on the host"
        session.emit({"kind": "note", "text": text})


def _checkpoint(session: Session) -> Path | None:
    """The newest one, which rank 0 verifies."""
    found = session.store.checkpoint(session.job.key) if session.world.leads else None
    path = session.world.of_first(None if found is None else str(found))
    return None if path is None else session.world.see(Path(str(path)))


class Clock:
    """Time of a stage over all its resumes, images a second, and when a checkpoint is due."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.started = self.logged = self.saved = time.perf_counter()
        self.before, self.logged_step = session.seconds, session.step
        self.stride = 1  # steps between two questions to the other ranks

    def stop(self) -> None:
        """Brings the session's seconds up to now."""
        self.session.seconds = self.before + time.perf_counter() - self.started

    def speed(self) -> float:
        """Images a second since the last call."""
        now = time.perf_counter()
        images = (self.session.step - self.logged_step) * self.session.stage.data.batch_size
        speed = images / max(now - self.logged, 1e-9)
        self.logged, self.logged_step = now, self.session.step
        return speed

    def pace(self, images: float) -> None:
        """Settles on rank 0's steps a second, if so many images pass in one, as the ranks' stride."""
        session = self.session
        steps = int(images / session.stage.data.batch_size)
        self.stride = int(session.world.of_first(max(1, min(steps, session.job.settings.log_every))))

    def signal(self, stopped: Callable[[], int]) -> int:
        """What any rank was asked to stop by, else 0. Ranks ask each other once a second: that costs a round trip."""
        session = self.session
        if session.world.size == 1:
            return stopped()
        return 0 if session.step % self.stride else session.world.any(stopped())

    def checkpoint_if_due(self) -> None:
        """Checkpoints at a log point if the last one is older than the recipe wants; 0 seconds mean every tick."""
        seconds = self.session.job.settings.checkpoint_seconds
        at_tick = self.session.step % self.session.steps_per_tick == 0
        due = time.perf_counter() - self.saved >= seconds and (seconds > 0 or at_tick)
        if due and not self.session.meters.pending:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Writes a checkpoint now; of several ranks the first does."""
        session = self.session
        if not session.world.leads:
            return
        self.stop()
        path = session.store.save_checkpoint(session.job.key, session.step, state.pack(session))
        self.saved = time.perf_counter()
        session.emit({"kind": "checkpoint", "step": session.step, "path": str(path)})


def _step(session: Session) -> None:
    take_step(session, session.world)


def take_step(session: Session, world: World) -> None:
    """Trains the part of the next batch that this rank has in a world."""
    batch = session.source.batch(session.step)
    if not isinstance(batch, Batch):
        where = f"source {session.stage.data.source.name!r}"
        raise PluginError(f"gave {type(batch).__name__}", where=where, fix="It must give a kdcore.Batch.")
    part = world.part(batch)
    session.context.begin(session.step, len(part.inputs), len(batch.inputs))
    session.step_kind(session.context, part)
    session.step += 1


def _log(session: Session, clock: Clock) -> None:
    means = session.meters.flush(session.stage.name, partial(diverge, session), session.world)
    check_finite(session, session.taught)  # before a checkpoint, and by all ranks alike
    session.stopwatch.settle()
    speed = clock.speed()
    if session.world.size > 1:
        clock.pace(speed)
    place = {"step": session.step, "ticks": session.ticks, "done": session.step / session.steps_per_tick}
    session.emit({"kind": "log", **place, "metrics": {**means, "images_per_second": speed}})


def _tick(session: Session, clock: Clock) -> None:
    """Evaluates, lets the controllers decide, and prepares the next tick."""
    rates = {learner.name: _rate(session, learner) for learner in session.trained}
    _log(session, clock)
    means = session.meters.take()
    session.tick += 1
    for learner in session.trained:
        learner.still = None
        row = _measure(session, learner, means, rates[learner.name])
        if not learner.diverged:
            learner.curve.append(row)
    for learner in session.taught_by:
        learner.curve.append(_still(session, learner))
    now = {learner.name: learner.curve[-1] for learner in session.trained}
    ticks = {"tick": session.tick, "ticks": session.ticks, "step": session.step}
    session.emit({"kind": "tick", **ticks, "metrics": now})
    _decide(session)
    parts.check(session)
    session.begin_tick()
    session.finished = session.finished or not session.trained


def _rate(session: Session, learner: Learner) -> float:
    spec = learner.optimizer
    return 0.0 if spec is None else float(spec.param_groups[0]["lr"])


def _measure(session: Session, learner: Learner, means: Mapping[str, float], rate: float) -> dict[str, float]:
    row = {"tick": session.tick, "epoch": session.epoch}
    row |= {
        f"train.{name.removeprefix(learner.name + '.')}": value
        for name, value in means.items()
        if name.startswith(f"{learner.name}.")
    }
    row["lr"] = rate
    if learner.scaler is not None:
        row |= learner.scaler.take()
    if not classifies(learner.module):
        return row
    row |= _accuracy(session, learner)
    if learner.diverged:
        return row
    row |= evaluate.metrics(session, learner) | evaluate.gradient_shares(session, learner)
    if row["accuracy"] > learner.best[1]:
        learner.best = (session.tick, row["accuracy"])
        learner.best_state = host_state(learner.evaluated)
    return row


def _accuracy(session: Session, learner: Learner) -> dict[str, float]:
    """On the monitor split, of logits that must be finite: a file holds no other numbers."""
    found = evaluate.accuracy(session, learner.evaluated, session.splits.monitor)
    if not math.isfinite(found["loss"]):  # its weights are finite, but what it makes of images is not
        where = f"stage {session.stage.name!r}, step {session.step}, member {learner.name!r}"
        what = f"its cross-entropy on the monitor split is {found['loss']}"
        fix = "Lower train.lr or set train.clip." if learner.terms else "Give it other weights, or train it again."
        diverge(session, learner.name, NumericError(what, where=where, fix=fix))
    return found


def _still(session: Session, learner: Learner) -> dict[str, float]:
    """The row of a frozen member that others learn from: evaluated once, until it is trained again."""
    if learner.still is None:
        learner.still = _accuracy(session, learner)
    return {"tick": session.tick, "epoch": session.epoch, **learner.still}


def _decide(session: Session) -> None:
    """Asks the controllers and does what they say; of several ranks the first asks."""
    events = list(_decisions(session)) if session.world.leads else None
    for event in session.world.of_first(events):
        _apply(session, event)
        session.events.append(event)
        session.emit({"kind": "decision", "event": event})


def _decisions(session: Session) -> Iterator[dict[str, Json]]:
    view = TickView(
        tick=session.tick,
        epoch=session.epoch,
        step=session.step,
        length=session.ticks,
        curves={learner.name: tuple(learner.curve) for learner in session.learners.values() if learner.curve},
        used=session.used,
        knobs=dict(session.knobs.values),
    )
    for name, controller in session.controllers:
        for decision in decisions_of(name, controller.decide(view)):
            yield _event(session, name, decision)


def decisions_of(controller: str, found: Any) -> list[Decision]:
    """What ``decide`` gave, as a list."""
    decisions = [] if found is None else list(found) if isinstance(found, Iterable) else [found]
    for decision in decisions:
        if not isinstance(decision, Decision):
            fix = "Return kdcore.Set, Drop or Finish, in a list."
            raise PluginError(f"decide() gave {decision!r}", where=f"controller {controller!r}", fix=fix)
    return decisions


def _event(session: Session, controller: str, decision: Decision) -> dict[str, Json]:
    event: dict[str, Json] = {
        "tick": session.tick, "step": session.step, "controller": controller, "target": "", "value": None,
        "epoch": session.epoch,
        "kind": type(decision).__name__.lower(), "reason": decision.reason,
    }  # fmt: skip
    if isinstance(decision, Set):
        return event | {"target": decision.knob, "value": decision.value}
    return event | {"target": decision.member} if isinstance(decision, Drop) else event


def _apply(session: Session, event: Mapping[str, Any]) -> None:
    """Does what a decision says."""
    if event["kind"] == "set":
        session.knobs.set(event["target"], event["value"])
    elif event["kind"] == "drop":
        name = event["target"]
        if name not in session.learners:
            where = f"controller {event['controller']!r}"
            raise PlanError(f"no member {name!r} to drop", where=where, fix=suggest(name, session.learners))
        session.learners[name].dropped = True
    else:
        session.finished = True
