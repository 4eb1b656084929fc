"""A batch in parts, one a rank: what is refused, and that all ranks hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import DataError, DeviceError, RecipeError
from . import memory, state

if TYPE_CHECKING:
    from .member import LiveTerm
    from .session import Session

IN_ONE = "Train it in one process"
SPREAD = "spread"
"""The attribute of a loss that brings its class statistics together from all ranks where it is True."""


def check(session: Session) -> None:
    """Compares the ranks' data, weights and whatever else a checkpoint holds with rank 0's, by hash.

    Raises:
        DeviceError: names a tensor that differs; a loss that keeps what its rank saw is found so after one step.
    """
    if session.world.size == 1:
        return
    own = {"the data": session.splits.fingerprint, **{name: _digest(tensor) for name, tensor in state.tensors(session)}}
    first = session.world.of_first(dict(own))
    different = [name for name, digest in own.items() if first.get(name) != digest]
    if different:
        what = f"{different[0]} of rank {session.world.rank} is not rank 0's"
        fix = f"{IN_ONE}, if a loss or model keeps what it saw; else give all ranks the same machine, torch and files."
        raise DeviceError(what, where=_where(session), fix=fix)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()[:16]


def check_live(session: Session) -> None:
    """Refuses what means something else with a part of a batch, and tells losses that their batch is one.

    Raises:
        RecipeError: names the step kind or the loss that wants whole batches.
        DataError: the last batch of an epoch is too small.
    """
    if session.world.size == 1:
        return
    for learner in session.learners.values():
        for term in learner.terms:
            if hasattr(term.module, SPREAD):
                setattr(term.module, SPREAD, True)
    if not getattr(session.step_kind, "splits", False):
        raise _refused(f"step {session.stage.step.name!r} takes no pieces", session.world.size, _where(session))
    for learner in session.learners.values():
        check_objective(learner.live(), session.world.size, learner.name, _where(session))
    _check_last(session)


def check_objective(terms: Iterable[LiveTerm], ranks: int, name: str = "student", where: str = "") -> None:
    """Refuses terms of a member that want whole batches and cannot bring their statistics together.

    Raises:
        RecipeError: names the loss.
    """
    if looking := memory.look_across((name, term) for term in terms if not hasattr(term.module, SPREAD)):
        raise _refused(looking, ranks, where)


def _refused(what: str, ranks: int, where: str) -> RecipeError:
    fix = f"{IN_ONE}, or take losses that are means over samples."
    return RecipeError(f"{what}, and each of {ranks} ranks has a part", where=where, fix=fix)


def _check_last(session: Session) -> None:
    size, total = session.stage.data.batch_size, len(session.splits.train)
    last = size if session.stage.data.drop_last or session.stage.tick != "epoch" else total % size or size
    least = memory.smallest(session) * session.world.size
    if last < least:
        what = f"a batch of {last} samples is too small for {session.world.size} ranks"
        raise DataError(what, where="data.batch_size", fix=f"Use {least} at least, and drop_last = true.")


def warnings(session: Session) -> list[str]:
    """That batch normalisation sees the ranks' parts, or the pieces that the recipe wants of them."""
    ranks, accumulate = session.world.size, session.stage.data.accumulate
    why = [*([f"{ranks} ranks"] if ranks > 1 else []), *(["train.accumulate"] if accumulate > 1 else [])]
    return memory.smaller(session, ranks * accumulate, " and ".join(why)) if why else []


def _where(session: Session) -> str:
    return f"stage {session.stage.name!r}, step {session.step}"
