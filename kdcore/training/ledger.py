"""How hard the terms of an objective pull at the logits: norms of their weighted gradients, and their cosines."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Batch
from ..outputs import Outputs
from .member import LiveTerm
from .objective import single_loss

ON_LOGITS = frozenset({"logits", "target"})


def at_logits(terms: Iterable[LiveTerm]) -> list[LiveTerm]:
    """The terms that act through the logits alone; a norm there would tell but a part of what the others do."""
    return [term for term in terms if getattr(term.module, "needs", ON_LOGITS) <= ON_LOGITS]


def gradient(term: LiveTerm, logits: Tensor, others: Mapping[str, Outputs], batch: Batch) -> Tensor:
    """Of the weighted term with respect to the logits: [B * C] float64."""
    leaf = logits.detach().requires_grad_()
    value = single_loss(term, Outputs(leaf), others, batch)
    return term.weight * torch.autograd.grad(value, leaf)[0].double().flatten()


def norms_and_cosines(gradients: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """[T] and [T, T] float64 of T gradients; the cosines of a gradient of 0 are 0."""
    stacked = torch.stack(list(gradients))
    units = F.normalize(stacked, dim=1)
    return stacked.norm(dim=1), units @ units.T


def entries(
    terms: Iterable[LiveTerm], own: Outputs, others: Mapping[str, Outputs], batch: Batch, share: float = 1.0
) -> dict[str, Tensor]:
    """``norm.<term>`` and ``cosine.<a>.<b>`` on a running batch, each 0-d, for terms that act through the logits alone.

    Every term is computed once more, also one that is fused with cross-entropy in training. Copies of the terms are
    asked, on copies of the logits, and random state is put back: what is trained does not notice.

    Args:
        terms: the live terms.
        own: the learner's outputs.
        others: outputs of the members that the terms name.
        batch: the batch or a piece of it.
        share: the piece's share of the batch. A mean over fewer samples has a steeper gradient at each of them, so a
            piece's norm is multiplied by the root of its share; the mean over pieces is then on the batch's scale.
    """
    found = at_logits(terms)
    if not found:
        return {}
    logits = own.logits.detach().float()
    sources = {name: Outputs(other.logits.detach().float()) for name, other in others.items()}
    with torch.random.fork_rng(devices=[logits.device] if logits.is_cuda else []):
        twins = [replace(term, module=copy.deepcopy(term.module)) for term in found]
        norms, cosines = norms_and_cosines([gradient(twin, logits, sources, batch) for twin in twins])
    rows = {f"norm.{term.label}": norm * share**0.5 for term, norm in zip(found, norms, strict=True)}
    for i, a in enumerate(found):
        rows |= {f"cosine.{a.label}.{b.label}": cosines[i, j] for j, b in enumerate(found) if j > i}
    return rows
