"""Out of memory: how it is told, another try with batches in pieces, and where pieces would mean something else."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Batch
from ..errors import DeviceError, PluginError
from ..failure import Failure, Retry
from ..job import Job
from ..registry import Catalog

if TYPE_CHECKING:
    from .member import Learner
    from .session import Session

CPU_WORDS = "can't allocate memory"  # of torch's allocator on the host, which raises a plain RuntimeError


@dataclass(frozen=True)
class Again:
    """The next try of a stage: in how many pieces, who decided it, and the step that failed."""

    pieces: int
    policy: str
    step: int


def is_exhausted(error: Exception) -> bool:
    """True if a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_WORDS in str(error)


def release() -> None:
    """Gives back what an ended try held: a session and its context name each other, so that takes a collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def next_try(job: Job, catalog: Catalog, session: Session | None, error: Exception) -> Again:
    """What the recipe's failure policy decides.

    Raises:
        DeviceError: the run ends: the policy says so, or pieces would mean something else.
        PluginError: the policy gave something else than a Retry with more pieces, or None.
    """
    where = f"stage {job.name!r}"
    if session is None:  # not even its models fit
        what = f"out of memory on {job.settings.device}: {error}"
        raise DeviceError(what, where=where, fix=_fix(1)) from error
    failure = Failure(job.name, session.step, session.stage.data.batch_size, session.pieces, _most(session), str(error))
    spec = job.settings.failure
    entry = catalog.find("failure_policy", spec.name)
    found = entry.load()(entry.options_class()(**spec.options)).decide(failure)
    if found is None:
        tried = f" with batches in {failure.pieces} pieces" if failure.pieces > 1 else ""
        what = f"out of memory on {session.device}{tried}: {error}"
        raise DeviceError(what, where=where, fix=_fix(failure.pieces)) from error
    if not isinstance(found, Retry) or not failure.pieces < found.pieces <= failure.most:
        fix = f"Return None, or kdcore.Retry with {failure.pieces + 1} to {failure.most} pieces."
        raise PluginError(f"decide() gave {found!r}", where=f"failure policy {entry.full_name!r}", fix=fix)
    check(session)
    return Again(found.pieces, entry.name, session.step)


def _fix(pieces: int) -> str:
    return "Lower data.batch_size." if pieces == 1 else 'Take smaller models, or precision = "bfloat16".'


def begin(session: Session, again: Again) -> None:
    """Cuts the batches of a session that is to try again, and says so in its events and warnings."""
    session.pieces = again.pieces
    text = f"out of memory at step {again.step}: from step {session.step} on, batches are in {again.pieces} pieces"
    session.events.append(
        {
            "tick": session.tick, "step": session.step, "controller": again.policy, "target": "batches",
            "value": again.pieces, "epoch": session.epoch, "kind": "pieces", "reason": text,
        }
    )  # fmt: skip
    session.emit({"kind": "warning", "text": text})
    session.warnings += [
        f"{learner.name} {learner.spec.model} normalises by batches, which are {again.pieces} times smaller than "
        "data.batch_size says: memory ran out"
        for learner in _normalised(session)
    ]


def check(session: Session) -> None:
    """Refuses pieces where they would mean something else.

    Raises:
        DeviceError: names the step kind or the loss that wants whole batches.
    """
    step = session.stage.step.name
    if not getattr(session.step_kind, "splits", False):
        raise _refused(session, f"step {step!r} takes no pieces", "Lower data.batch_size.")
    for learner in session.learners.values():
        for term in learner.live():
            if not getattr(term.module, "mean_over_batch", True):
                what = f"loss {term.label!r} of {learner.name} compares the samples of a batch"
                raise _refused(session, what, "Lower data.batch_size, or take a loss that is a mean over samples.")
            if getattr(term.module, "min_batch", 1) > 1 and not _has_batch_norm(term.module):
                what = f"class statistics want whole batches (loss {term.label!r} of {learner.name})"
                raise _refused(session, what, "Lower data.batch_size, or take a loss without class statistics.")


def _refused(session: Session, what: str, fix: str) -> DeviceError:
    what = f"out of memory on {session.device}, and {what}"
    return DeviceError(what, where=f"stage {session.stage.name!r}, step {session.step}", fix=fix)


def cut(session: Session, batch: Batch) -> list[Batch]:
    """A batch in pieces of about equal size, none larger than the share of ``data.batch_size`` that a piece has."""
    if session.pieces == 1:
        return [batch]
    samples, largest = len(batch.inputs), -(-session.stage.data.batch_size // session.pieces)
    count = max(1, min(-(-samples // largest), samples // _smallest(session)))
    targets = [None] * count if batch.target is None else batch.target.tensor_split(count)
    parts = zip(batch.inputs.tensor_split(count), targets, batch.index.tensor_split(count), strict=True)
    return [replace(batch, inputs=inputs, target=target, index=index) for inputs, target, index in parts]


def _most(session: Session) -> int:
    return max(1, session.stage.data.batch_size // _smallest(session))


def _smallest(session: Session) -> int:
    """Samples of the smallest piece: one alone has no variance for batch normalisation."""
    return 2 if any(_normalised(session)) else 1


def _normalised(session: Session) -> Iterator[Learner]:
    """Members that are trained and normalise by batches, be it in an adapter of a loss alone."""
    for learner in session.learners.values():
        parts = [learner.module, *(term.module for term in learner.terms)]
        if learner.terms and any(map(_has_batch_norm, parts)):
            yield learner


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())
