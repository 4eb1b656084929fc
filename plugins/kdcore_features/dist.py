"""Loss ``dist``: rows and columns of the probabilities are to correlate, not to agree.

Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022 (arXiv 2205.10536), section 4.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .logits import logits
from .options import DistOptions

EPS = 1e-8  # beside the product of the norms, as in the public code: a constant row or column correlates with nothing


def dist_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    variant: Literal["public", "paper"] = "public",
) -> Tensor:
    """``T^2 (beta (1 - mean_i r(p_i., q_i.)) + gamma (1 - mean_j r(p_.j, q_.j)))``, r being Pearson's correlation.

    p = softmax(student / T) and q = softmax(teacher / T): beta compares the classes of each sample, gamma the samples
    under each class. The paper has no T^2. A batch of one has no second part: it counts as not correlated, gamma T^2.

    Args:
        student: floating logits.
        teacher: floating logits, of the same shape.
        beta: weight of the relation between classes.
        gamma: weight of the relation between samples.
        temperature: T > 0.
        variant: "paper" leaves T^2 out.

    Returns:
        0-d.
    """
    p, q = ((z / temperature).softmax(1) for z in (student, teacher))
    between, within = (1 - correlation(*pair).mean() for pair in ((p, q), (p.T, q.T)))
    scale = temperature**2 if variant == "public" else 1.0
    return scale * (beta * between + gamma * within)


def correlation(
    a: Tensor,  # [N, M]
    b: Tensor,  # [N, M]
) -> Tensor:  # [N]
    """Pearson's correlation of each row of a with the same row of b."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    # the norm's derivative is 0 at 0, where that of a root would be infinite
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (norms + EPS)


class Dist(nn.Module):
    """The registered loss ``dist``."""

    needs: frozenset[str] = frozenset({"logits"})

    def __init__(self, options: DistOptions) -> None:
        super().__init__()
        self.beta, self.gamma = options.beta, options.gamma
        self.temperature, self.variant = options.temperature, options.variant

    @classmethod
    def build(cls, shapes: Shapes, options: DistOptions) -> Self:
        return cls(options)

    @property
    def min_batch(self) -> int:
        """One sample correlates with nothing."""
        return 2 if self.gamma else 1

    @property
    def mean_over_batch(self) -> bool:
        """False where samples are compared with each other."""
        return not self.gamma

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return dist_loss(*logits(student, teacher), self.beta, self.gamma, self.temperature, self.variant)
