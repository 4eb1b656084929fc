"""What a model gives to losses, and what a loss is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Outputs:
    """A member's outputs for one batch.

    Args:
        logits: [B, C], floating.
        taps: named features that a term asked for, each [B, ...].
    """

    logits: Tensor
    taps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Shapes:
    """Shapes without the batch dimension, for losses that build adapters.

    Args:
        classes: number of classes C.
        student: tap name -> shape of the learner's feature.
        teacher: tap name -> shape of the source's feature; empty for a loss on labels alone.
        samples: size of the training split, for losses with a memory bank.
    """

    classes: int
    samples: int
    student: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    teacher: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Loss(Protocol):
    """A registered loss: a class with ``needs`` and ``build``.

    ``needs`` is a subset of {"logits", "taps", "index", "target"}; with "taps" the class has a static or class method
    ``taps(options)``, which gives the names of the student's taps and those of the source's. ``build`` returns a module
    whose ``forward(student: Outputs, teacher: Outputs | None, batch: Batch)`` gives a scalar, or a dict of scalars that
    are summed. Parameters of the module are trained with its member and saved. An option that a knob may set is an
    attribute of the module of the same name. A module with a method ``with_cross_entropy`` computes cross-entropy in
    the same call (see :mod:`kdcore.losses.terms`). Other promises are those that :mod:`kdcore.testing.loss` checks.
    """

    needs: frozenset[str]

    @classmethod
    def build(cls, shapes: Shapes, options: Any) -> nn.Module: ...
