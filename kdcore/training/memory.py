"""Out of memory: how it is told, another try with batches in pieces, and where pieces would mean something else."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Batch
from ..errors import DeviceError, KdError, PlanError, PluginError
from ..failure import Failure, Retry
from ..job import Job
from ..registry import Catalog
from .ledger import at_logits

if TYPE_CHECKING:
    from .member import Learner, LiveTerm
    from .session import Session

WORDS = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""Of plain RuntimeErrors: torch's allocator on the host, the driver, and cuBLAS and cuDNN, which have their own."""


@dataclass(frozen=True)
class Again:
    """The next try of a stage: in how many pieces, who decided it, and the step that failed."""

    pieces: int
    policy: str
    step: int


def is_exhausted(error: Exception) -> bool:
    """True if a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in WORDS)


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
    if job.settings.world_size > 1:  # the other ranks are in the middle of the step
        what = f"out of memory on {job.settings.device}, one of {job.settings.world_size} ranks: {error}"
        raise DeviceError(what, where=where, fix="Lower data.batch_size, or take more ranks.") from error
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
    session.warnings += smaller(session, again.pieces, "memory ran out")


def check(session: Session, exhausted: bool = True) -> bool:
    """Refuses pieces where they would mean something else, because memory ran out or because the recipe wants them.

    Returns:
        True if a live term looks across the samples of a batch, which wants the whole batch's logits.

    Raises:
        DeviceError: names the step kind or the loss that wants whole batches; memory ran out.
        PlanError: the same, where the recipe wants them.
    """
    kind, step = session.step_kind, f"step {session.stage.step.name!r}"
    live = [(learner.name, term) for learner in session.learners.values() for term in learner.live()]
    looking = look_across(live)
    problem = obstacle(live)
    if not getattr(kind, "splits", False):
        problem = f"{step} takes no pieces"
    elif looking and not getattr(kind, "across", False):
        problem = f"{looking}, which {step} does not see in pieces"
    if problem:
        raise _refused(session, exhausted, problem, ", or take losses on logits alone" if looking else "")
    return bool(looking)


def check_objective(terms: Iterable[LiveTerm]) -> None:
    """Refuses an objective whose batches can never be in pieces, before its stage is there.

    Raises:
        PlanError: names the loss that wants whole batches.
    """
    if problem := obstacle([("student", term) for term in terms]):
        raise _unwanted(problem)


def obstacle(live: Sequence[tuple[str, LiveTerm]]) -> str:
    """Why terms, each with its member's name, want whole batches even if these go forward twice; nothing if all is
    well.
    """
    looking = look_across(live)
    for name, term in live if looking else ():
        if not at_logits([term]) or term.spec.through or any(True for _ in term.module.parameters()):
            here = f"loss {term.label!r} of {name}"
            return looking if here in looking else f"{looking}, and {here} is not one on logits alone"
    return ""


def look_across(live: Iterable[tuple[str, LiveTerm]]) -> str:
    """The first term that looks across the samples of a batch, and how; nothing if all are means over them."""
    return next((f"{why} (loss {term.label!r} of {name})" for name, term in live if (why := across(term.module))), "")


def across(loss: nn.Module) -> str:
    """How a loss looks across the samples of a batch; nothing if it is a mean over them."""
    if not getattr(loss, "mean_over_batch", True):
        return "the samples of a batch are compared"
    if getattr(loss, "min_batch", 1) > 1 and not _has_batch_norm(loss):
        return "class statistics want whole batches"
    return ""


def _refused(session: Session, exhausted: bool, what: str, more: str) -> KdError:
    where = f"stage {session.stage.name!r}, step {session.step}"
    if not exhausted:
        return _unwanted(what, where)
    what = f"out of memory on {session.device}, and {what}"
    return DeviceError(what, where=where, fix=f"Lower data.batch_size{more}.")


def _unwanted(what: str, where: str = "") -> PlanError:
    fix = "Leave train.accumulate out, or take losses on logits alone."
    return PlanError(f"batches in pieces, but {what}", where=where, fix=fix)


def sizes(session: Session, samples: int, own: int) -> list[int]:
    """Samples of the pieces that this rank makes of its ``own`` of a batch's ``samples``: about equal, none larger than
    the share of ``data.batch_size`` that a piece has.

    Ranks make equally many pieces, though their parts differ by a sample: they add up what each piece records.
    """
    if session.pieces == 1:
        return [own]
    ranks = session.world.size
    largest = -(-session.stage.data.batch_size // (ranks * session.pieces))
    count = max(1, min(-(-samples // (ranks * largest)), samples // ranks // smallest(session)))
    return [len(range(first, own, count)) for first in range(count)]


def cut(session: Session, batch: Batch, part: float = 1.0) -> list[Batch]:
    """A batch in pieces of these :func:`sizes`.

    Args:
        session: says how often batches are cut.
        batch: this rank's part of a batch.
        part: its share of the samples.
    """
    own = len(batch.inputs)
    found = sizes(session, round(own / part), own)
    if len(found) == 1:
        return [batch]
    targets = [None] * len(found) if batch.target is None else torch.split(batch.target, found)
    parts = zip(torch.split(batch.inputs, found), targets, torch.split(batch.index, found), strict=True)
    return [replace(batch, inputs=inputs, target=target, index=index) for inputs, target, index in parts]


def _most(session: Session) -> int:
    return max(1, session.stage.data.batch_size // smallest(session))


def smallest(session: Session) -> int:
    """Samples of the smallest piece: one alone has no variance for batch normalisation."""
    return 2 if any(normalised(session)) else 1


def normalised(session: Session) -> Iterator[Learner]:
    """Members that are trained and normalise by batches, be it in an adapter of a loss alone."""
    for learner in session.learners.values():
        parts = [learner.module, *(term.module for term in learner.terms)]
        if learner.terms and any(map(_has_batch_norm, parts)):
            yield learner


def smaller(session: Session, times: int, why: str) -> list[str]:
    """Warnings that batch normalisation sees less than a batch."""
    text = f"normalises by batches, which are {times} times smaller than data.batch_size says: {why}"
    return [f"{learner.name} {learner.spec.model} {text}" for learner in normalised(session)]


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())
