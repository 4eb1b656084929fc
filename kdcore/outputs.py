"""What a model gives to losses, and what a loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """What a loss is built for: shapes without the batch dimension, of the taps that it asked for.

    Args:
        classes: number of classes C.
        student: tap name -> shape of the learner's feature, in the order of the model's taps.
        teacher: tap name -> shape of the source's feature; empty for a loss on labels alone.
        samples: size of the training split, for losses with a memory bank.
        labels: [samples] int64, of the training split, on the models' device.
        norms: tap name -> weight and bias [C] of the batch norm that comes last in the source's feature, where the
            source names it.
        adapter: builds the adapter that the loss's options name, from the shapes of a learner's feature and a source's;
            None for a loss whose options name none (:meth:`kdcore.Registrar.adapter`).
    """

    classes: int
    samples: int
    student: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    teacher: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: Tensor | None = None
    norms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    adapter: Callable[[tuple[int, ...], tuple[int, ...]], nn.Module] | None = None


class Loss(Protocol):
    """A registered loss: a class with ``needs`` and ``build``.

    ``needs`` is a subset of {"logits", "taps", "index", "target"}; with "taps" the class has a static or class method
    ``taps(options)``, which gives the names of the student's taps and those of the source's; they are patterns
    as of file names: ``"stage?"`` is stage1 to stage9, ``"stage*[0-9]"`` every stage. ``build`` returns a module whose
    ``forward(student: Outputs, teacher: Outputs | None, batch: Batch)`` gives a scalar, or a dict of scalars that
    are summed. Parameters of the module are trained with its member and saved. An option that a knob may set is an
    attribute of the module of the same name. A module with a method ``with_cross_entropy`` computes cross-entropy in
    the same call (see :mod:`kdcore.losses.terms`). Other promises are those that :mod:`kdcore.testing.loss` checks.
    """

    needs: frozenset[str]

    @classmethod
    def build(cls, shapes: Shapes, options: Any) -> nn.Module: ...
