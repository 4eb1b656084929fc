"""Losses and weights that are no longer finite: they end the stage, or the member where the stage says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NumericError
from .member import Learner

if TYPE_CHECKING:
    from .session import Session


def check_finite(session: Session, learners: Iterable[Learner]) -> None:
    """Looks for weights that are not finite: they never reach a file.

    Raises:
        NumericError: names stage, step, member and tensor; see :func:`diverge`.
    """
    for learner in learners:
        named = [(name, tensor) for name, tensor in _weights(learner) if tensor.is_floating_point()]
        if not named or learner.diverged:
            continue
        bad = torch.stack([~torch.isfinite(t).all() for _, t in named]).tolist()  # one sync a member
        if any(bad):
            name = next(n for (n, _), is_bad in zip(named, bad, strict=True) if is_bad)
            where = f"stage {session.stage.name!r}, step {session.step}, member {learner.name!r}, {name!r}"
            fix = "Lower train.lr or set train.clip." if learner.terms else "Give it other weights, or train it again."
            diverge(session, learner.name, NumericError("not finite", where=where, fix=fix))


def _weights(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Of the model, and what its terms train beside it."""
    yield from learner.module.state_dict().items()
    for term in learner.terms:
        yield from ((f"{term.label}/{name}", tensor) for name, tensor in term.module.named_parameters())


def diverge(session: Session, name: str, error: NumericError) -> None:
    """Ends a member's training where the stage drops what diverges, and nobody learns from it; a warning says so.

    Raises:
        NumericError: ``error``, in any other case.
    """
    learner = session.learners.get(name)
    sources = {term.source for other in session.learners.values() for term in other.terms}
    if session.stage.diverged == "stop" or learner is None or not learner.terms or name in sources:
        raise error
    if learner.diverged:
        return
    learner.diverged = learner.dropped = True
    learner.best_state = None
    session.warnings.append(f"member {name!r} diverged by step {session.step}, {error.what}; it was dropped")
    session.emit({"kind": "warning", "text": session.warnings[-1], "preflight": True})
    session.begin_tick()  # settles anew who is trained
