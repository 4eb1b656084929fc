"""Loss ``mlkd``: predictions at several temperatures, compared by instance, by batch and by class.

Jin et al., Multi-Level Logit Distillation, CVPR 2023; with ``normalize = "instance"`` its form in
Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
"""

from __future__ import annotations

from typing import Literal, Self

from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes
from kdcore.losses import kd_loss

from .logits import logits
from .options import MLKDOptions

BESIDE = (3.0, 5.0, 2.0, 6.0)
"""The temperatures beside the base one."""


def mlkd_loss(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    temperatures: tuple[float, ...] = (4.0, *BESIDE),
    normalize: Literal["none", "instance"] = "none",
) -> Tensor:
    """The sum over the temperatures of instance, batch and class level, each where the teacher is less sure.

    Instance level: KD, T^2 KL, of a sample. Batch and class level: :func:`batch_level` and :func:`class_level`. Samples
    count whose top probability is at most the median of the batch; classes whose probability, summed over the batch, is
    at most the median of the classes. What does not count is 0 in the mean.

    Args:
        student: floating logits, C >= 2.
        teacher: floating logits, of the same shape and dtype.
        temperatures: each above 0.
        normalize: "instance" standardises the logits of the instance level, and of it alone.

    Returns:
        0-d.
    """
    p = teacher.softmax(1)
    samples, classes = at_most_median(p.amax(1)), at_most_median(p.sum(0))
    levels = [
        (kd_loss(student, teacher, temperature=t, normalize=normalize, reduction="none") * samples).mean()
        + batch_level(student, teacher, t, samples)
        + class_level(student, teacher, t, classes)
        for t in temperatures
    ]
    return sum(levels[1:], levels[0])


def instance_level(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    temperatures: tuple[float, ...] = (4.0, *BESIDE),
    normalize: Literal["none", "instance"] = "none",
) -> Tensor:
    """KD of every sample, summed over the temperatures: all that a strongly augmented view is compared by."""
    levels = [kd_loss(student, teacher, temperature=t, normalize=normalize) for t in temperatures]
    return sum(levels[1:], levels[0])


def batch_level(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    temperature: float,
    counts: Tensor | float = 1.0,  # [B]
) -> Tensor:
    """``1/B sum_i counts_i sum_j (G_t - G_s)_ij^2`` with G = P P^T [B, B], how alike two samples are predicted."""
    p, q = ((z / temperature).softmax(1) for z in (student, teacher))
    return (counts * (q @ q.T - p @ p.T).square().sum(1)).mean()


def class_level(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    temperature: float,
    counts: Tensor | float = 1.0,  # [C]
) -> Tensor:
    """``1/C sum_c counts_c sum_k (M_t - M_s)_ck^2`` with M = P^T P [C, C], how two classes go together in the batch."""
    p, q = ((z / temperature).softmax(1).T for z in (student, teacher))
    return (counts * (q @ q.T - p @ p.T).square().sum(1)).mean()


def at_most_median(values: Tensor) -> Tensor:
    """[N], 1.0 where a value is at most the median, else 0.0."""
    return (values <= values.median()).to(values.dtype)  # the lower of two: nothing lies between them


class MLKD(nn.Module):
    """The registered loss ``mlkd``."""

    needs: frozenset[str] = frozenset({"logits"})
    mean_over_batch = False

    def __init__(self, options: MLKDOptions) -> None:
        super().__init__()
        self.temperature, self.beside = options.temperature, options.beside
        self.normalize, self.views = options.normalize, options.views
        if options.views == 2:  # a sample's place counts, so no gradient share can be measured on plain samples
            self.needs = self.needs | {"index"}

    @classmethod
    def build(cls, shapes: Shapes, options: MLKDOptions) -> Self:
        return cls(options)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t = logits(student, teacher)
        temperatures = (self.temperature, *self.beside)
        if self.views == 1:
            return mlkd_loss(s, t, temperatures, self.normalize)
        if len(s) % 2:
            raise ValueError(
                f"views = 2 wants as many strong samples as weak ones, not {len(s)} together. "
                'Name the transform "views", or leave views out.'
            )
        (weak, strong), (t_weak, t_strong) = s.chunk(2), t.chunk(2)
        weakly = mlkd_loss(weak, t_weak, temperatures, self.normalize)
        return weakly + instance_level(strong, t_strong, temperatures, self.normalize)
