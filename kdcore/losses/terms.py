"""The losses that a recipe names: cross_entropy, kd and dkd.

``kd`` and ``dkd`` have ``with_cross_entropy``, by which an objective that also holds ``cross_entropy`` computes both in
one call. Options that a knob may set (temperature, alpha, beta, label_smoothing) are plain attributes.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor, nn

from ..outputs import Outputs, Shapes
from .functional import DKDSettings, KDSettings, cross_entropy, dkd_loss, kd_loss
from .options import CrossEntropyOptions, DKDOptions, KDOptions, Normalize


class HasTarget(Protocol):
    """A batch: ``target`` is [B] int64, [B, C] soft, or None for unlabelled data."""

    @property
    def target(self) -> Tensor | None: ...


class CrossEntropy(nn.Module):
    needs: frozenset[str] = frozenset({"logits", "target"})

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    @classmethod
    def build(cls, shapes: Shapes, options: CrossEntropyOptions) -> Self:
        return cls(**options.model_dump())

    def forward(self, student: Outputs, teacher: Outputs | None, batch: HasTarget) -> Tensor:
        if batch.target is None:
            raise ValueError("cross_entropy needs labels, but batch.target is None. Use a loss on the teacher alone.")
        return cross_entropy(student.logits, batch.target, label_smoothing=self.label_smoothing)


class KD(nn.Module):
    needs: frozenset[str] = frozenset({"logits"})
    teacher_grad = False
    """Set by the framework where the gradient goes through the source."""

    def __init__(self, temperature: float = 4.0, normalize: Normalize = "none", eps: float | None = None) -> None:
        super().__init__()
        self.temperature, self.normalize, self.eps = temperature, normalize, eps

    @classmethod
    def build(cls, shapes: Shapes, options: KDOptions) -> Self:
        return cls(**options.model_dump())

    @property
    def min_batch(self) -> int:
        """The smallest batch that it can take."""
        return _min_batch(self.normalize)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: HasTarget) -> Tensor:
        return kd_loss(*_pair(student, teacher, "kd"), batch.target, **self._settings())

    def with_cross_entropy(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: HasTarget,
        *,
        weight: float,
        ce_weight: float,
        label_smoothing: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gives weight * kd + ce_weight * ce, and both unweighted, detached; no "ce" without a target."""
        settings = self._settings(weight, ce_weight, label_smoothing)
        return _picked(*kd_loss(*_pair(student, teacher, "kd"), batch.target, return_parts=True, **settings))

    def _settings(self, weight: float = 1.0, ce_weight: float = 0.0, label_smoothing: float = 0.0) -> KDSettings:
        return KDSettings(
            temperature=self.temperature,
            normalize=self.normalize,
            eps=self.eps,
            kd_weight=weight,
            ce_weight=ce_weight,
            label_smoothing=label_smoothing,
            teacher_grad=self.teacher_grad,
        )


class DKD(nn.Module):
    needs: frozenset[str] = frozenset({"logits", "target"})
    teacher_grad = False
    """Set by the framework where the gradient goes through the source."""

    def __init__(
        self,
        temperature: float = 4.0,
        normalize: Normalize = "none",
        eps: float | None = None,
        alpha: float = 1.0,
        beta: float = 8.0,
    ) -> None:
        super().__init__()
        self.temperature, self.normalize, self.eps = temperature, normalize, eps
        self.alpha, self.beta = alpha, beta

    @classmethod
    def build(cls, shapes: Shapes, options: DKDOptions) -> Self:
        return cls(**options.model_dump())

    @property
    def min_batch(self) -> int:
        """The smallest batch that it can take."""
        return _min_batch(self.normalize)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: HasTarget) -> Tensor:
        return dkd_loss(*_pair(student, teacher, "dkd"), batch.target, **self._settings())

    def with_cross_entropy(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: HasTarget,
        *,
        weight: float,
        ce_weight: float,
        label_smoothing: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gives weight * dkd + ce_weight * ce, and both unweighted, detached."""
        settings = self._settings(weight, ce_weight, label_smoothing)
        return _picked(*dkd_loss(*_pair(student, teacher, "dkd"), batch.target, return_parts=True, **settings))

    def _settings(self, weight: float = 1.0, ce_weight: float = 0.0, label_smoothing: float = 0.0) -> DKDSettings:
        return DKDSettings(
            temperature=self.temperature,
            normalize=self.normalize,
            eps=self.eps,
            alpha=self.alpha,
            beta=self.beta,
            kd_weight=weight,
            ce_weight=ce_weight,
            label_smoothing=label_smoothing,
            teacher_grad=self.teacher_grad,
        )


def _min_batch(normalize: Normalize) -> int:
    return 2 if normalize == "class" else 1  # one sample has no class statistics


def _pair(student: Outputs, teacher: Outputs | None, name: str) -> tuple[Tensor, Tensor]:
    """Both logits in one dtype: a teacher kept in half precision is widened."""
    if teacher is None:
        raise ValueError(f"{name} compares with another member, but has none. Give its term a source.")
    dtype = torch.promote_types(student.logits.dtype, teacher.logits.dtype)
    return student.logits.to(dtype), teacher.logits.to(dtype)


def _picked(total: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return total, {name: parts[name] for name in ("kd", "ce") if name in parts}
