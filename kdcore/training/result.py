"""The result of a stage: every member's accuracies and costs, its weights, and where it was made."""

from __future__ import annotations

import base64
import platform
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from .. import __version__
from ..card import Card
from ..codec import canonical
from ..losses._extension import build_info
from ..losses._ops import choose_backend
from ..plan import Json
from . import cost, evaluate
from .mapped import classes_of
from .member import Learner, classifies, host_state
from .session import Session

ACCURACIES = (
    "monitor_accuracy",
    "test_accuracy",
    "monitor_accuracy_last",
    "test_accuracy_last",
    "best_monitor_accuracy",
    "test_accuracy_at_best",
)
"""Shares of a split. The first two are of the weights that are delivered: the last, or those best on the monitor."""


def finish(session: Session) -> dict[str, Any]:
    """Evaluates every member, commits the result to the store, and returns the content of its result.json."""
    passes = {name: learner.passes + learner.stored for name, learner in session.learners.items()}
    members = {name: _member(session, learner) for name, learner in session.learners.items()}
    forward = {name: member["flops"] or 0 for name, member in members.items()}
    images = session.step * session.stage.data.batch_size
    result = {
        "key": session.job.key,
        "name": session.stage.name,
        "length": session.stage.length,
        "tick": session.stage.tick,
        "ticks": session.tick,
        "step": session.stage.step.name,
        "seed": session.seed,
        "steps": session.step,
        "seconds": session.seconds,
        "images_per_second": images / session.seconds if session.seconds else None,
        "members": members,
        "flops": {name: count * forward[name] for name, count in passes.items()},
        "member_seconds": {name: learner.seconds for name, learner in session.learners.items()},
        "events": session.events,
        "warnings": session.warnings,
        "environment": _environment(session),
    }
    if not session.world.leads:
        return result
    sound = [learner for learner in session.learners.values() if not learner.diverged]
    kept = [learner for learner in sound if learner.terms or learner.spec.init is None]
    files = {f"{learner.name}.safetensors": _file(session, learner) for learner in kept}
    session.store.save_result(session.job.key, {"result.json": canonical(result).encode(), **files})
    return result


def _file(session: Session, learner: Learner) -> bytes:
    """The delivered weights with a card, so that the file can be used alone."""
    splits, ref = session.splits, learner.spec.model
    card = Card(
        model=ref.model, options=dict(ref.options), shape=splits.info.shape,
        classes=classes_of(learner.module, splits.info),
        mean=splits.mean, std=splits.std, scale=255 if splits.train.images.dtype == torch.uint8 else 1,
    )  # fmt: skip
    return save(_delivered(session, learner), card.metadata)


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
        "curve": learner.curve if learner.terms else [],
        "best_tick": learner.best[0],
        **dict.fromkeys(ACCURACIES),
        "monitor_correct": "",
        "monitor_images": 0,
    }
    if learner.diverged:
        return row | {"diverged": True}
    if not classifies(module):
        return row
    with evaluate.evaluating(module):
        row |= {"flops": cost.flops(module, info), "latency_ms": cost.latency_ms(module, info)}
    last = _accuracies(session, learner)
    at_best = _accuracies(session, learner, learner.best_state) if learner.best_state else last
    delivered = at_best if session.stage.keep == "best" else last
    return row | {
        "monitor_accuracy": delivered.monitor,
        "test_accuracy": delivered.test,
        "monitor_accuracy_last": last.monitor,
        "test_accuracy_last": last.test,
        "best_monitor_accuracy": max(last.monitor, at_best.monitor),
        "test_accuracy_at_best": at_best.test,
        "monitor_correct": delivered.correct,
        "monitor_images": len(session.splits.monitor),
    }


class _Accuracies(NamedTuple):
    """On both splits; ``correct`` has a bit for each monitor image, packed from the highest on, as base64."""

    monitor: float
    test: float
    correct: str


def _accuracies(session: Session, learner: Learner, weights: dict[str, torch.Tensor] | None = None) -> _Accuracies:
    """With these weights or the last ones."""
    module = learner.evaluated
    kept = host_state(module) if weights is not None else None
    if weights is not None:
        module.load_state_dict(weights)
    hits: list[torch.Tensor] = []
    monitor = evaluate.accuracy(session, module, session.splits.monitor, hits)["accuracy"]
    test = evaluate.accuracy(session, module, session.splits.test)["accuracy"]
    if kept is not None:
        module.load_state_dict(kept)
    own = (
        torch.cat(hits) if hits else torch.empty(0, dtype=torch.bool, device=session.device)
    )  # fewer images than ranks
    packed = np.packbits(session.world.joined(own, len(session.splits.monitor)).cpu().numpy())
    return _Accuracies(monitor, test, base64.b64encode(packed.tobytes()).decode())


def _environment(session: Session) -> dict[str, Json]:
    """What is recorded beside a result but is not part of its key."""
    return {
        "kdcore": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else _cpu(),
        "device": str(session.device),
        "images": "device" if session.resident else "host",
        "threads": session.job.settings.threads,
        "precision": session.job.settings.precision,
        "losses": _losses(session.device.type),
        "world_size": session.world.size,
    }


def _losses(device: str) -> str:
    """The losses' back end, and the CPU's instruction set, which decides last digits as torch's version does."""
    backend = choose_backend("auto", device)
    return f"{backend} {build_info()['isa']}" if backend == "cpu" else backend


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
