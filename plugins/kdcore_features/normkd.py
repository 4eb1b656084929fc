"""Loss ``normkd``: KD or DKD at a temperature of each sample's own, in proportion to the deviation of its logits.

Chi et al., NormKD: Normalized Logits for Knowledge Distillation, 2023 (arXiv 2308.00520).
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes
from kdcore.losses import dkd_loss, kd_loss

from .logits import logits
from .options import NormKDOptions


def normkd_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    temperature: float = 2.0,
) -> Tensor:
    """``mean_i tau_t^2 KL(softmax(t / tau_t) || softmax(s / tau_s))``, ``tau_z = T std(z_i)`` (divisor C - 1).

    Each row counts by its teacher's temperature; the gradient flows through the student's. A constant row, which has no
    deviation, is taken as it is: a constant teacher counts nothing, a constant student is finite and is taught.

    Args:
        student: floating logits, C >= 2.
        teacher: floating logits, of the same shape and dtype.
        temperature: T > 0, in deviations.

    Returns:
        0-d.
    """
    (s, _), (t, variance) = _unit(student), _unit(teacher)
    return (variance * kd_loss(s, t, temperature=temperature, reduction="none")).mean()


def normkd_dkd_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    target: Tensor,  # [B] int64, or [B, C] soft
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """The same with ``alpha TCKD + beta NCKD`` instead of KL; arguments as for :func:`kdcore.losses.dkd_loss`."""
    (s, _), (t, variance) = _unit(student), _unit(teacher)
    rows = dkd_loss(s, t, target, temperature=temperature, alpha=alpha, beta=beta, reduction="none")
    return (variance * rows).mean()


def _unit(z: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, C] of mean 0 over their deviation, and their variance [B]; a constant row becomes exactly 0."""
    d = z - z[:, :1].detach()  # what the mean of equal numbers rounds to differs from them
    d = d - d.mean(1, keepdim=True)
    variance = d.square().sum(1) / (z.shape[1] - 1)
    return d / variance.masked_fill(variance == 0, 1).sqrt()[:, None], variance


class NormKD(nn.Module):
    """The registered loss ``normkd``."""

    needs: frozenset[str] = frozenset({"logits", "target"})

    def __init__(self, options: NormKDOptions) -> None:
        super().__init__()
        self.temperature, self.decoupled = options.temperature, options.decoupled
        self.alpha, self.beta = options.alpha, options.beta

    @classmethod
    def build(cls, shapes: Shapes, options: NormKDOptions) -> Self:
        return cls(options)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pair = logits(student, teacher)
        if self.decoupled:
            return normkd_dkd_loss(*pair, batch.target, self.temperature, self.alpha, self.beta)
        return normkd_loss(*pair, self.temperature)
