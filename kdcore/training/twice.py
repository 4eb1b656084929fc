"""Batches in pieces under losses that look across samples: two forward passes, and one loss on the whole batch.

The gradient of such a loss at the logits [B, C] is of the whole batch, and small; what costs memory is the graph
behind them. So every piece goes forward without a graph, the loss is taken once, and every piece goes forward again to
take its rows of the gradient back. That costs one more forward pass and is exact: buffers and random numbers are put
back between the two, so both passes see the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import Batch
from ..outputs import Outputs

if TYPE_CHECKING:
    from .step import StepContext


def two_passes(ctx: StepContext, batch: Batch) -> None:
    """Forward, objective and backward of all trained members, whose live terms act through the logits alone."""
    with _rehearsal(ctx):
        whole = _logits(ctx, batch)
    slopes = {name: _slope(ctx, name, whole, batch) for name in ctx.trained}
    first = 0
    for piece in ctx.pieces(batch):
        ctx._share = 1.0  # the slopes are of all pieces, and of this rank's share
        rows = slice(first, first := first + len(piece.inputs))
        for name in ctx.trained:
            own = ctx.forward(name, piece.inputs).logits
            ctx.backward(name, (own.float() * slopes[name][rows]).sum())


def _logits(ctx: StepContext, batch: Batch) -> dict[str, Outputs]:
    """[B, C] float32 of every source and every trained member."""
    parts: dict[str, list[Tensor]] = {name: [] for name in (*ctx.sources, *ctx.trained)}
    for piece in ctx.pieces(batch):
        for name, found in parts.items():
            found.append(ctx.source(name, piece).logits)
    return {name: Outputs(torch.cat(found).float()) for name, found in parts.items()}


def _slope(ctx: StepContext, name: str, whole: dict[str, Outputs], batch: Batch) -> Tensor:
    """[B, C] float32: the gradient of a member's objective at its logits.

    It is weighted by the rank's share here, since class statistics bring the others' slopes into it, with their shares.
    """
    leaf = whole[name].logits.detach().requires_grad_()
    return torch.autograd.grad(ctx.loss(name, Outputs(leaf), whole, batch) * ctx.part, leaf)[0]


@contextmanager
def _rehearsal(ctx: StepContext) -> Iterator[None]:
    """Inside, trained members run without graphs; buffers that they change, or put others in place of, come back."""
    parts = [part for name in ctx.trained for part in ctx._session.learners[name].module.modules()]
    buffers = [(part, name, buffer) for part in parts for name, buffer in part.named_buffers(recurse=False)]
    kept = [buffer.clone() for _, _, buffer in buffers]
    ctx._graphs = False
    yield
    ctx._graphs = True
    for (part, name, buffer), before in zip(buffers, kept, strict=True):
        setattr(part, name, buffer.copy_(before))
    ctx._calls.clear()
