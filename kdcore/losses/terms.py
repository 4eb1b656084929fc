"""The losses that a recipe names: cross_entropy, kd and dkd.

``kd`` and ``dkd`` have ``with_cross_entropy``, by which an objective that also holds ``cross_entropy`` computes both in
one call. Options that a knob may set (temperature, alpha, beta, label_smoothing) are plain attributes.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributed import group

from ..outputs import Outputs, Shapes
from . import Normalize
from .functional import KDSettings, cross_entropy, dkd_loss, kd_loss
from .options import CrossEntropyOptions, DKDOptions, KDOptions


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


class Distillation(nn.Module):
    """What KD and DKD share: one functional call, with or without cross-entropy."""

    teacher_grad = False
    """Set by the framework where the gradient goes through the source."""
    spread = False
    """Set by the framework where each process has a part of the batch: class statistics are those of all parts."""

    def __init__(self, temperature: float, normalize: Normalize, eps: float | None) -> None:
        super().__init__()
        self.temperature, self.normalize, self.eps = temperature, normalize, eps

    @property
    def min_batch(self) -> int:
        """The smallest batch that it can take: one sample has no class statistics."""
        return 2 if self.normalize == "class" else 1

    @property
    def shift_invariant(self) -> bool:
        """False where a constant added to a sample's logits counts: it moves the class statistics of the others."""
        return self.normalize != "class"

    def forward(self, student: Outputs, teacher: Outputs | None, batch: HasTarget) -> Tensor:
        return self._value(student, teacher, batch, self._settings())[0]

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
        """Gives weight * distillation + ce_weight * ce, and both unweighted, detached; no "ce" without a target."""
        total, parts = self._value(student, teacher, batch, self._settings(weight, ce_weight, label_smoothing))
        return total, {name: parts[name] for name in ("kd", "ce") if name in parts}

    def _value(
        self, student: Outputs, teacher: Outputs | None, batch: HasTarget, settings: KDSettings
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over this process's samples, and its parts."""
        if not (self.spread and self.normalize == "class"):
            return self._call(student, teacher, batch, settings)
        shared: KDSettings = {**settings, "group": group.WORLD, "reduction": "sum"}
        total, parts = self._call(student, teacher, batch, shared)
        return total / len(student.logits), parts

    def _call(
        self, student: Outputs, teacher: Outputs | None, batch: HasTarget, settings: KDSettings
    ) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def _settings(self, weight: float = 1.0, ce_weight: float = 0.0, label_smoothing: float = 0.0) -> KDSettings:
        # a literal: torch.compile cannot trace the call KDSettings(...)
        return {
            "temperature": self.temperature,
            "normalize": self.normalize,
            "eps": self.eps,
            "kd_weight": weight,
            "ce_weight": ce_weight,
            "label_smoothing": label_smoothing,
            "teacher_grad": self.teacher_grad,
        }


class KD(Distillation):
    """The registered loss ``kd``."""

    needs: frozenset[str] = frozenset({"logits"})

    def __init__(self, temperature: float = 4.0, normalize: Normalize = "none", eps: float | None = None) -> None:
        super().__init__(temperature, normalize, eps)

    @classmethod
    def build(cls, shapes: Shapes, options: KDOptions) -> Self:
        return cls(**options.model_dump())

    def _call(
        self, student: Outputs, teacher: Outputs | None, batch: HasTarget, settings: KDSettings
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return kd_loss(*_pair(student, teacher, "kd"), batch.target, return_parts=True, **settings)


class DKD(Distillation):
    """The registered loss ``dkd``."""

    needs: frozenset[str] = frozenset({"logits", "target"})

    def __init__(
        self,
        temperature: float = 4.0,
        normalize: Normalize = "none",
        eps: float | None = None,
        alpha: float = 1.0,
        beta: float = 8.0,
    ) -> None:
        super().__init__(temperature, normalize, eps)
        self.alpha, self.beta = alpha, beta

    @classmethod
    def build(cls, shapes: Shapes, options: DKDOptions) -> Self:
        return cls(**options.model_dump())

    def _call(
        self, student: Outputs, teacher: Outputs | None, batch: HasTarget, settings: KDSettings
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pair = _pair(student, teacher, "dkd")
        return dkd_loss(*pair, batch.target, alpha=self.alpha, beta=self.beta, return_parts=True, **settings)


def _pair(student: Outputs, teacher: Outputs | None, name: str) -> tuple[Tensor, Tensor]:
    """Both logits in one dtype: a teacher kept in half precision is widened."""
    if teacher is None:
        raise ValueError(f"{name} compares with another member, but has none. Give its term a source.")
    dtype = torch.promote_types(student.logits.dtype, teacher.logits.dtype)
    return student.logits.to(dtype), teacher.logits.to(dtype)
