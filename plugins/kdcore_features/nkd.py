"""Loss ``nkd``: the target class by the teacher's own share of it, the other classes normalised among themselves.

Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
Customized Soft Labels, ICCV 2023 (arXiv 2303.13005), the loss NKD.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes
from kdcore.losses import dkd_loss, kd_loss

from .logits import label, logits
from .options import NKDOptions


def nkd_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    target: Tensor,  # [B] int64, or [B, C] soft
    temperature: float = 1.0,
    gamma: float = 1.5,
) -> Tensor:
    """``mean_i(-p_t[y] log p_s[y] - gamma T^2 sum_j q_t[j] log q_s[j])``, j over the classes other than the target y.

    p = softmax(z), q = softmax(z / T) without y. As in the paper these are cross-entropies: at student = teacher the
    value is the teacher's entropy, not 0; the gradient is that of DKD's NCKD.

    Args:
        student: floating logits, C >= 2.
        teacher: floating logits, of the same shape and dtype.
        target: labels; of soft ones the largest share is the target.
        temperature: T > 0, of the other classes.
        gamma: weight of the other classes.

    Returns:
        0-d.
    """
    target = label(target)
    share = teacher.softmax(1).gather(1, target[:, None]).squeeze(1)
    hit = kd_loss(student, teacher, target, kd_weight=0.0, ce_weight=1.0, reduction="none")
    divergence = dkd_loss(student, teacher, target, alpha=0.0, beta=1.0, temperature=temperature)
    entropy = temperature**2 * _entropy_of_others(teacher / temperature, target)
    return (share * hit).mean() + gamma * (divergence + entropy)


def _entropy_of_others(z: Tensor, target: Tensor) -> Tensor:
    """The mean entropy of softmax over the classes other than the target, in nats."""
    others = torch.arange(z.shape[1] - 1, device=z.device)
    others = others + (others >= target[:, None])  # [B, C - 1], skips the target's column
    log_q = z.gather(1, others).log_softmax(1)
    return -(log_q.exp() * log_q).sum(1).mean()


class NKD(nn.Module):
    """The registered loss ``nkd``."""

    needs: frozenset[str] = frozenset({"logits", "target"})

    def __init__(self, options: NKDOptions) -> None:
        super().__init__()
        self.temperature, self.gamma = options.temperature, options.gamma

    @classmethod
    def build(cls, shapes: Shapes, options: NKDOptions) -> Self:
        return cls(options)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return nkd_loss(*logits(student, teacher), batch.target, self.temperature, self.gamma)
