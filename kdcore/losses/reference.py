"""The losses in plain torch: the definition that every other back end is compared with.

Nothing here validates (``functional`` does, once) and nothing goes through a probability whose logarithm is needed:
with m = max and M = logsumexp over the classes that are not the target, and d = h_y - M, the target's log-probability
is logsigmoid(d), the rest's is logsigmoid(-d), and the others' among themselves is h_j - M. No mass can underflow
before its logarithm is taken, so no constant is ever added to avoid it. Shifts are detached: every quantity is
invariant to them, so gradients of any order stay exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Normalize
from .normalise import accumulator, count, keep, normalise

Reduction = Literal["none", "sum", "mean"]
Weight = float | Tensor
Target = Tensor | Literal["teacher"] | None
Statistics = Literal["batch", "detached"] | tuple[Tensor, Tensor, Tensor, Tensor]
Result = Tensor | tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What KD and DKD share; see :func:`kdcore.losses.kd_loss` for the meaning of each."""

    temperature: Weight = 4.0
    normalize: Normalize = "none"
    eps: float | None = None
    kd_weight: Weight = 1.0
    ce_weight: Weight = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    stats: Statistics = "batch"
    reduction: Reduction = "mean"
    return_parts: bool = False


@dataclass(frozen=True)
class Labels:
    """A target, resolved.

    Args:
        index: [B] int64, 0 in an ignored row; None without a target.
        rows: [B, C] soft labels, or None.
        valid: [B] bool, or None where every row counts.
    """

    index: Tensor | None = None
    rows: Tensor | None = None
    valid: Tensor | None = None


def kd_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    target: Target,
    settings: Settings,
) -> Result:
    labels = resolve_target(target, teacher, settings.ignore_index)
    s, t = _widen(student, labels), _widen(teacher, labels)
    kd = kd_rows(*_normalised(s, t, labels, settings), settings.temperature)
    return _assemble(s, labels, {"kd": kd}, settings)


def dkd_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    target: Target,
    settings: Settings,
    alpha: Weight,
    beta: Weight,  # a number, 0-d or [B]
) -> Result:
    labels = resolve_target(target, teacher, settings.ignore_index)
    assert labels.index is not None
    s, t = _widen(student, labels), _widen(teacher, labels)
    tckd, nckd = dkd_rows(*_normalised(s, t, labels, settings), labels.index, settings.temperature)
    kd = _like(alpha, tckd) * tckd + _like(beta, nckd) * nckd
    return _assemble(s, labels, {"kd": kd, "tckd": tckd, "nckd": nckd}, settings)


def cross_entropy(
    student: Tensor,  # [B, C]
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    labels = resolve_target(target, student, ignore_index)
    rows = cross_entropy_rows(_widen(student, labels), labels, label_smoothing)
    return reduce_rows(rows, labels.valid, reduction)


def kd_rows(
    s: Tensor,  # [B, C]
    t: Tensor,  # [B, C]
    temperature: Weight,
) -> Tensor:  # [B]
    """T^2 KL(softmax(t/T) || softmax(s/T)), row by row."""
    log_s, log_t = (F.log_softmax(_over(z - _row_max(z), temperature), dim=1) for z in (s, t))
    return _square(temperature, s) * kl_rows(log_t, log_s)


def dkd_rows(
    s: Tensor,  # [B, C]
    t: Tensor,  # [B, C]
    index: Tensor,  # [B]
    temperature: Weight,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """T^2 TCKD and T^2 NCKD, row by row."""
    binary_s, others_s = _decouple(s, index, temperature)
    binary_t, others_t = _decouple(t, index, temperature)
    square = _square(temperature, s)
    return square * kl_rows(binary_t, binary_s), square * kl_rows(others_t, others_s)


def kl_rows(
    log_p: Tensor,  # [B, K]
    log_q: Tensor,  # [B, K]
) -> Tensor:  # [B]
    """KL(p || q) from logarithms, with 0 log 0 = 0; infinite only where q is 0 and p is not."""
    p = log_p.exp()
    empty = p == 0  # filled before the product: 0 * inf would be NaN, in the gradient too
    return (p * (log_p.masked_fill(empty, 0) - log_q.masked_fill(empty, 0))).sum(1)


def cross_entropy_rows(
    s: Tensor,  # [B, C]
    labels: Labels,
    label_smoothing: float,
) -> Tensor:  # [B]
    """-log p_y of the raw logits; the smoothing moves its share to the uniform distribution over all C classes."""
    log_p = F.log_softmax(s, dim=1)
    if labels.rows is None:
        assert labels.index is not None
        hit = log_p.gather(1, labels.index[:, None]).squeeze(1)
    else:
        rows = labels.rows.to(s.dtype)
        hit = (rows * log_p.masked_fill(rows == 0, 0)).sum(1)
    if label_smoothing == 0:  # a masked class would make 0 * inf of it
        return -hit
    return (label_smoothing - 1) * hit - label_smoothing * log_p.mean(1)


def resolve_target(
    target: Target,
    teacher: Tensor,  # [B, C]
    ignore_index: int,
) -> Labels:
    if target is None:
        return Labels()
    if isinstance(target, str):
        return Labels(index=teacher.argmax(1))
    if target.dim() == 2:
        return Labels(index=target.argmax(1), rows=target)
    valid = target != ignore_index
    return Labels(index=target.where(valid, 0), valid=valid)


def reduce_rows(
    rows: Tensor,  # [B]
    valid: Tensor | None,  # [B] bool
    reduction: Reduction,
) -> Tensor:
    """Over the rows that count: "mean" is 0, with zero gradients, where none does."""
    if valid is not None:
        rows = rows.masked_fill(~valid, 0)
    if reduction == "none":
        return rows
    return rows.sum() / count(rows, valid) if reduction == "mean" else rows.sum()


def _assemble(s: Tensor, labels: Labels, parts: dict[str, Tensor], settings: Settings) -> Result:
    total = _like(settings.kd_weight, s) * parts["kd"]
    no_ce = not isinstance(settings.ce_weight, Tensor) and settings.ce_weight == 0
    if labels.index is not None and not (no_ce and not settings.return_parts):
        parts = {"ce": cross_entropy_rows(s, labels, settings.label_smoothing), **parts}
        total = total if no_ce else total + _like(settings.ce_weight, s) * parts["ce"]
    loss = reduce_rows(total, labels.valid, settings.reduction)
    if not settings.return_parts:
        return loss
    return loss, {name: reduce_rows(rows.detach(), labels.valid, "mean") for name, rows in parts.items()}


def _normalised(s: Tensor, t: Tensor, labels: Labels, settings: Settings) -> tuple[Tensor, Tensor]:
    stats = settings.stats
    given = (None, None) if isinstance(stats, str) else (stats[:2], stats[2:])
    h_s, h_t = (
        normalise(z, settings.normalize, settings.eps, valid=labels.valid, statistics=of, detached=stats == "detached")
        for z, of in zip((s, t), given, strict=True)
    )
    return h_s, h_t


def _decouple(h: Tensor, index: Tensor, temperature: Weight) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target against rest, [B, 2], and of the other classes among themselves, [B, C]."""
    column = index[:, None]
    rest = h.scatter(1, column, -math.inf)  # leaves every sum below exactly
    top = _row_max(rest)
    alone = top == -math.inf  # every other class is masked
    top = top.masked_fill(alone, 0)
    shifted = _over(rest - top, temperature)
    lse = shifted.exp().sum(1, keepdim=True).masked_fill(alone, 1).log()
    odds = (_over(h.gather(1, column) - top, temperature) - lse).masked_fill(alone, math.inf)
    return F.logsigmoid(torch.cat([odds, -odds], dim=1)), shifted - lse


def _widen(z: Tensor, labels: Labels) -> Tensor:
    """In the accumulator's dtype, ignored rows 0: whatever they hold, NaN too, reaches nothing."""
    return keep(z.to(accumulator(z)), labels.valid)


def _like(weight: Weight, z: Tensor) -> Weight:
    return weight.to(z.dtype) if isinstance(weight, Tensor) else weight


def _row_max(z: Tensor) -> Tensor:  # [B, 1]
    return z.detach().amax(1, keepdim=True)


def _square(temperature: Weight, z: Tensor) -> Weight:
    return _like(temperature, z) ** 2


def _over(z: Tensor, temperature: Weight) -> Tensor:
    """Divides by T; a learned T gets no gradient from a masked class, where it would be 0 * inf."""
    if not isinstance(temperature, Tensor):
        return z / temperature
    masked = z == -math.inf
    return (z.masked_fill(masked, 0) / _like(temperature, z)).masked_fill(masked, -math.inf)
