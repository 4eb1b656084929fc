"""Evaluation at a tick: accuracy, requested metrics, and the gradient share of each term."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split
from ..errors import PluginError
from ..outputs import Outputs
from .ledger import at_logits, gradient, norms_and_cosines
from .member import Learner

if TYPE_CHECKING:
    from .session import Session


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its mode back."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def accuracy(
    session: Session, module: nn.Module, split: Split, correct: list[Tensor] | None = None
) -> dict[str, float]:
    """``accuracy`` (share) and ``loss`` (mean cross-entropy in nats) of a classifier on a split.

    Adds to ``correct`` one tensor a batch, [B] bool, True where it is right.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=session.device)  # right ones, and loss
    with evaluating(module), session.autocast():
        for inputs, target in session.evaluated(split):
            logits = module(inputs).float()
            hits = logits.argmax(1) == target
            if correct is not None:
                correct.append(hits)
            sums += torch.stack([hits.sum().double(), F.cross_entropy(logits, target, reduction="sum").double()])
    right, loss = session.world.sum(sums).tolist()
    return {"accuracy": right / len(split), "loss": loss / len(split)}


def metrics(session: Session, learner: Learner) -> dict[str, float]:
    """The requested metrics of a learner against the source of its first live term that has one."""
    source = next((term.source for term in learner.live() if term.source is not None), None)
    wanted = [name for name in sorted(session.needs) if name in session.metrics]
    if source is None or not wanted:
        return {}
    teacher = session.learners[source].evaluated
    sums = {name: torch.zeros((), dtype=torch.float64, device=session.device) for name in wanted}
    with evaluating(learner.evaluated, teacher), session.autocast():
        for inputs, target in session.evaluated(session.splits.monitor):
            student_logits, teacher_logits = learner.evaluated(inputs), teacher(inputs)
            for name in wanted:
                value = session.metrics[name](student_logits, teacher_logits, target)
                _check_metric(name, value, len(target))
                sums[name] += value.sum()
    return {name: session.world.sum(total).item() / len(session.splits.monitor) for name, total in sums.items()}


def _check_metric(name: str, value: Any, samples: int) -> None:
    if not isinstance(value, Tensor) or value.shape != (samples,):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        fix = "It must return a tensor [B]: one value a sample."
        raise PluginError(f"gave {found} for {samples} samples", where=f"metric {name!r}", fix=fix)


def gradient_shares(session: Session, learner: Learner) -> dict[str, float]:
    """How hard each live term pulls at the logits, on one fixed monitor batch.

    ``share.<term>`` is the norm of the term's weighted gradient over the sum of all norms; ``cosine.<a>.<b>`` the
    cosine between two terms' gradients. Terms that need more than logits and labels are left out.
    """
    terms = at_logits(learner.live())
    batch = session.probe
    if len(terms) < 2 or len(batch.target) < max(getattr(t.module, "min_batch", 1) for t in terms):
        return {}
    sources = {t.source: session.learners[t.source].evaluated for t in terms if t.source is not None}
    with evaluating(learner.module, *sources.values()), session.autocast():
        logits = _logits(session, learner.module)
        others = {name: Outputs(_logits(session, module)) for name, module in sources.items()}
        with torch.enable_grad():
            gradients = {t.label: gradient(t, logits, others, batch) for t in terms}
    return _compare(gradients)


def _logits(session: Session, module: nn.Module) -> Tensor:
    """Of the probe: [B, C] float32."""
    parts = [module(inputs) for inputs in torch.split(session.probe.inputs, session.eval_size)]
    return torch.cat(parts).float()


def _compare(gradients: dict[str, Tensor]) -> dict[str, float]:
    norms, cosines = norms_and_cosines(gradients.values())
    total = norms.sum().item()
    if not 0 < total < float("inf"):
        return {}
    names = list(gradients)
    found = {f"share.{name}": norm / total for name, norm in zip(names, norms.tolist(), strict=True)}
    table = cosines.tolist()
    for i, a in enumerate(names):
        found |= {f"cosine.{a}.{b}": table[i][j] for j, b in enumerate(names) if j > i}
    return found
