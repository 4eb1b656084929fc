"""The loop of one stage: steps, ticks, decisions, checkpoints, and the result at the end."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save

from .. import __version__
from ..data import Splits
from ..errors import DeviceError, Interrupted, PlanError, suggest
from ..job import Emit, Job
from ..plan import Drop, Finish, Json, Set, TickView, canonical, decode
from ..registry import Catalog
from ..store import Store
from . import cost, device, evaluate, state
from .member import Learner, classifies, host_state
from .preflight import preflight
from .session import Session, curves, open_session


def run_stage(
    job: Job,
    catalog: Catalog,
    load: Callable[[Any], Splits],
    store: Store,
    emit: Emit,
    stopped: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """Trains a stage, or goes on with it, and commits its result.

    Args:
        job: the stage under its key, which the caller holds a lease on.
        catalog: where its names are found.
        load: gives the splits of a :class:`kdcore.SourceSpec`.
        store: results that it needs, its checkpoints, its result.
        emit: told of progress, ticks, decisions, warnings and checkpoints.
        stopped: a signal number if the process was asked to stop, else 0; read after every step.

    Returns:
        The content of the result's result.json.

    Raises:
        Interrupted: after a checkpoint.
        NumericError, DataError, PlanError, DeviceError, StorageError: what their names say; the last checkpoint stays.
    """
    place = device.resolve(job.settings.device)
    with device.sandbox(place, job.settings.threads):
        try:
            stage = decode(job.name, job.stage)
            inputs = {key: _needed(store, key) for key in job.needs}
            used = curves(inputs, stage.uses.items())
            session = open_session(job, catalog, load(stage.data), store, emit, used)
            _train(session, inputs, stopped)
            return _finish(session)
        except torch.OutOfMemoryError as error:
            fix = "Lower data.batch_size."
            raise DeviceError(f"out of memory on {place}: {error}", where=f"stage {job.name!r}", fix=fix) from error


def _needed(store: Store, key: str) -> dict[str, Any]:
    found = store.result(key)
    if found is None:
        raise PlanError(f"the result {key[:12]} that it needs is not in the store", where="job")
    return found


def _train(session: Session, inputs: Mapping[str, Any], stopped: Callable[[], int]) -> None:
    folder = session.store.checkpoint(session.job.key)
    if folder is not None:
        state.unpack(session, folder)
    else:
        session.warnings = preflight(session, inputs)
    for text in session.warnings:
        session.emit({"kind": "warning", "text": text})
    session.emit({"kind": "stage_started", "tick": session.tick, "ticks": session.ticks, "step": session.step})
    clock = Clock(session)
    session.begin_tick()
    total = session.ticks * session.steps_per_tick if session.ticks else 0
    while session.step < total and not session.finished:
        _step(session)
        if session.step % session.steps_per_tick == 0:
            _tick(session, clock)
        elif session.step % session.job.settings.log_every == 0:
            _log(session, clock)
        if session.finished or session.step >= total:
            break
        if signal := stopped():
            _log(session, clock)
            clock.checkpoint()
            raise Interrupted(signal)
        if session.step % session.steps_per_tick == 0 or session.step % session.job.settings.log_every == 0:
            clock.checkpoint_if_due()
    clock.stop()
    state.check_finite(session)


class Clock:
    """Time of a stage over all its resumes, images a second, and when a checkpoint is due."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.started = self.logged = self.saved = time.perf_counter()
        self.before, self.logged_step = session.seconds, session.step

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

    def checkpoint_if_due(self) -> None:
        """Checkpoints if the last one is older than the recipe wants; an interval of 0 means every tick."""
        seconds = self.session.job.settings.checkpoint_seconds
        at_tick = self.session.step % self.session.steps_per_tick == 0
        if time.perf_counter() - self.saved >= seconds and (seconds > 0 or at_tick):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Writes a checkpoint now."""
        session = self.session
        self.stop()
        path = session.store.save_checkpoint(session.job.key, session.step, state.pack(session))
        self.saved = time.perf_counter()
        session.emit({"kind": "checkpoint", "step": session.step, "path": str(path)})


def _step(session: Session) -> None:
    session.context.begin(session.step)
    batch = session.source.batch(session.step)
    session.catalog.find("step", session.stage.step).load()(session.context, batch)
    session.step += 1


def _log(session: Session, clock: Clock) -> None:
    means = session.meters.flush(session.stage.name)
    speed = clock.speed()
    session.emit({"kind": "log", "step": session.step, "metrics": {**means, "images_per_second": speed}})


def _tick(session: Session, clock: Clock) -> None:
    """Evaluates, lets the controllers decide, and prepares the next tick."""
    rates = {learner.name: _rate(session, learner) for learner in session.trained}
    _log(session, clock)
    means = session.meters.take()
    session.tick += 1
    for learner in session.trained:
        learner.curve.append(_measure(session, learner, means, rates[learner.name]))
    now = {learner.name: learner.curve[-1] for learner in session.trained}
    session.emit({"kind": "tick", "tick": session.tick, "ticks": session.ticks, "metrics": now})
    _decide(session)
    session.begin_tick()
    session.finished = session.finished or not session.trained


def _rate(session: Session, learner: Learner) -> float:
    spec = learner.optimizer
    return 0.0 if spec is None else float(spec.param_groups[0]["lr"])


def _measure(session: Session, learner: Learner, means: Mapping[str, float], rate: float) -> dict[str, float]:
    row = {"epoch": session.step / session.source.steps_per_epoch if session.source.steps_per_epoch else session.tick}
    row |= {
        f"train.{name.removeprefix(learner.name + '.')}": value
        for name, value in means.items()
        if name.startswith(f"{learner.name}.")
    }
    row["lr"] = rate
    if not classifies(learner.module):
        return row
    row |= evaluate.accuracy(session, learner.evaluated, session.splits.monitor)
    row |= evaluate.metrics(session, learner) | evaluate.gradient_shares(session, learner)
    if row["accuracy"] > learner.best[1]:
        learner.best = (session.tick, row["accuracy"])
        learner.best_state = host_state(learner.evaluated)
    return row


def _decide(session: Session) -> None:
    view = TickView(
        tick=session.tick,
        epoch=session.step / session.source.steps_per_epoch if session.source.steps_per_epoch else float(session.tick),
        step=session.step,
        length=session.ticks,
        curves={learner.name: tuple(learner.curve) for learner in session.learners.values() if learner.curve},
        used=session.used,
        knobs=dict(session.knobs.values),
    )
    for name, controller in session.controllers:
        for decision in controller.decide(view):
            session.events.append(_apply(session, name, decision))
            session.emit({"kind": "decision", "event": session.events[-1]})


def _apply(session: Session, controller: str, decision: Set | Drop | Finish) -> dict[str, Json]:
    event: dict[str, Json] = {
        "tick": session.tick, "step": session.step, "controller": controller, "target": "", "value": None,
        "epoch": session.step / session.source.steps_per_epoch if session.source.steps_per_epoch else session.tick,
        "kind": type(decision).__name__.lower(), "reason": decision.reason,
    }  # fmt: skip
    if isinstance(decision, Set):
        session.knobs.set(decision.knob, decision.value)
        event |= {"target": decision.knob, "value": decision.value}
    elif isinstance(decision, Drop):
        if decision.member not in session.learners:
            fix = suggest(decision.member, session.learners)
            raise PlanError(f"no member {decision.member!r} to drop", where=f"controller {controller!r}", fix=fix)
        session.learners[decision.member].dropped = True
        event["target"] = decision.member
    else:
        session.finished = True
    return event


def _finish(session: Session) -> dict[str, Any]:
    members = {name: _member(session, learner) for name, learner in session.learners.items()}
    forward = {name: member["flops"] or 0 for name, member in members.items()}
    images = session.step * session.stage.data.batch_size
    result = {
        "key": session.job.key,
        "name": session.stage.name,
        "length": session.stage.length,
        "tick": session.stage.tick,
        "ticks": session.tick,
        "step": session.stage.step,
        "seed": session.seed,
        "steps": session.step,
        "seconds": session.seconds,
        "images_per_second": images / session.seconds if session.seconds else None,
        "members": members,
        "flops": {name: learner.passes * forward[name] for name, learner in session.learners.items()},
        "events": session.events,
        "warnings": session.warnings,
        "environment": environment(session),
    }
    kept = [learner for learner in session.learners.values() if learner.terms or learner.spec.init is None]
    files = {f"{learner.name}.safetensors": save(_delivered(session, learner)) for learner in kept}
    session.store.save_result(session.job.key, {"result.json": canonical(result).encode(), **files})
    return result


def _delivered(session: Session, learner: Learner) -> dict[str, torch.Tensor]:
    keep_best = session.stage.keep == "best" and learner.best_state is not None
    return dict(learner.best_state or {}) if keep_best else host_state(learner.evaluated)


def _member(session: Session, learner: Learner) -> dict[str, Any]:
    module, info = learner.evaluated, session.splits.info
    row: dict[str, Any] = {
        "model": str(learner.spec.model),
        "trained": bool(learner.terms),
        "params": cost.parameters(module),
        "flops": None,
        "latency_ms": None,
        "curve": learner.curve,
        "best_tick": learner.best[0],
        "monitor_accuracy": None,
        "best_monitor_accuracy": None,
        "test_accuracy": None,
        "test_accuracy_at_best": None,
    }
    if not classifies(module):
        return row
    with evaluate.evaluating(module):
        row |= {"flops": cost.flops(module, info), "latency_ms": cost.latency_ms(module, info)}
    last = evaluate.accuracy(session, module, session.splits.monitor)["accuracy"]
    test = evaluate.accuracy(session, module, session.splits.test)["accuracy"]
    row |= {"monitor_accuracy": last, "best_monitor_accuracy": max(last, learner.best[1]), "test_accuracy": test}
    row["test_accuracy_at_best"] = _test_at_best(session, learner, test)
    return row


def _test_at_best(session: Session, learner: Learner, last: float) -> float:
    if learner.best_state is None:
        return last
    module, kept = learner.evaluated, host_state(learner.evaluated)
    module.load_state_dict(learner.best_state)
    found = evaluate.accuracy(session, module, session.splits.test)["accuracy"]
    module.load_state_dict(kept)
    return found


def environment(session: Session) -> dict[str, Json]:
    """What is recorded beside a result but is not part of its key."""
    return {
        "kdcore": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else _cpu(),
        "device": str(session.device),
        "threads": session.job.settings.threads,
        "precision": session.job.settings.precision,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
