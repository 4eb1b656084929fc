"""Adapters from a student's feature to a teacher's, built from the shapes of both.

A feature without its batch dimension is a vector [D], tokens [N, D] or a map [C, H, W]. A map that comes out larger or
smaller than the teacher's is compared at the smaller size (:func:`pairs.match`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kdcore import Options, Outputs, PlanError, Shapes

from .maps import is_map, match, pooled
from .options import AdapterOptions
from .pairs import Pair, features, taps

Shape: TypeAlias = tuple[int, ...]
HEADS = 8  # of attention, where the width can be divided by it


def auto(student: Shape, teacher: Shape, options: Options) -> nn.Module:
    """Linear for vectors and for tokens of equal number, a 1x1 convolution for maps, attention for all else."""
    if is_map(student) and is_map(teacher):
        return conv1x1(student, teacher, options)
    alike = student[:-1] == teacher[:-1] and not is_map(student)
    return (linear if alike else attention)(student, teacher, options)


def conv1x1(student: Shape, teacher: Shape, options: Options) -> nn.Module:
    """[B, C_s, H, W] -> [B, C_t, h, w], at the smaller size of the two."""
    if not (is_map(student) and is_map(teacher)):
        raise _misfit("conv1x1", student, teacher, "It takes maps [C, H, W].")
    return nn.Sequential(to_smaller(student, teacher), nn.Conv2d(student[0], teacher[0], 1))


def linear(student: Shape, teacher: Shape, options: Options) -> nn.Module:
    """[B, D_s] -> [B, D_t], or the same for each token of [B, N, D_s]."""
    if is_map(student) or student[:-1] != teacher[:-1]:
        raise _misfit("linear", student, teacher, "It takes vectors [D], or tokens [N, D] of equal number.")
    return nn.Linear(student[-1], teacher[-1])


def attention(student: Shape, teacher: Shape, options: Options) -> nn.Module:
    """Any feature -> any feature: see :class:`Attention`."""
    return Attention(student, teacher)


class Attention(nn.Module):
    """Cross-attention: a learned query for each position of the teacher's feature attends to the student's positions.

    A map has H W positions of width C, tokens have N of width D, a vector has one. The student's positions get a
    learned code each, since attention alone does not know their places; the result [B, positions, width] takes the
    teacher's form: [B, C, H, W], [B, N, D] or [B, D].

    Args:
        student: shape of the student's feature.
        teacher: shape of the teacher's feature.
    """

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.shape = teacher
        (count, width), (wanted, out) = _positions(student), _positions(teacher)
        self.places = nn.Parameter(0.02 * torch.randn(count, width))
        self.queries = nn.Parameter(0.02 * torch.randn(wanted, out))
        heads = next(n for n in (HEADS, 4, 2, 1) if out % n == 0)
        self.attend = nn.MultiheadAttention(out, heads, kdim=width, vdim=width, batch_first=True)

    def forward(self, feature: Tensor) -> Tensor:
        """[B, *student] -> [B, *teacher]."""
        keys = _sequence(feature)
        queries = self.queries.expand(len(feature), -1, -1)
        found, _ = self.attend(queries, keys + self.places, keys, need_weights=False)
        if is_map(self.shape):
            found = found.transpose(1, 2)
        return found.reshape(-1, *self.shape)


class Adapted(nn.Module):
    """A loss that compares the learner's features, through adapters, with the source's.

    Args:
        found: taps that correspond.
        adapters: one for each pair.
    """

    needs: frozenset[str] = frozenset({"taps"})
    taps = staticmethod(taps)

    def __init__(self, found: tuple[Pair, ...], adapters: nn.ModuleList) -> None:
        super().__init__()
        self.pairs, self.adapters = found, adapters

    @property
    def min_batch(self) -> int:
        """The smallest batch that it takes: batch norm has no statistics of one position of one sample."""
        return 2 if any(isinstance(part, nn.BatchNorm2d) for part in self.modules()) else 1

    def compared(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """The adapted and the source's feature of each pair, of one shape.

        Raises:
            PlanError: an adapter gives another shape than the teacher's.
        """
        return [
            self._fitted(adapter, *features(student, teacher, pair))
            for pair, adapter in zip(self.pairs, self.adapters, strict=True)
        ]

    def _fitted(self, adapter: nn.Module, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        own = adapter(own)
        if own.ndim == other.ndim == 4:
            own, other = match(own, other)
        if own.shape != other.shape:
            what = f"an adapter gives {list(own.shape)}, the teacher's feature is {list(other.shape)}"
            raise PlanError(what, where="adapter", fix='Repair the adapter, or write adapter = "auto".')
        return own, other


def adapters(
    shapes: Shapes,
    found: tuple[Pair, ...],
    options: AdapterOptions,
    of_maps: Callable[[Shape, Shape], nn.Module] | None = None,
) -> nn.ModuleList:
    """An adapter for each pair: the one that the recipe names; for two maps ``of_maps``, if it names none."""
    assert shapes.adapter is not None, "the framework gives it where options have adapts = True"
    built = []
    for pair in found:
        student, teacher = shapes.student[pair[0]], shapes.teacher[pair[1]]
        own = of_maps is not None and options.adapter == "auto" and is_map(student) and is_map(teacher)
        built.append(of_maps(student, teacher) if own else shapes.adapter(student, teacher))
    return nn.ModuleList(built)


def to_smaller(student: Shape, teacher: Shape) -> nn.Module:
    """Averages a student's map to the smaller height and width of the two."""
    return Pool(tuple(map(min, student[1:], teacher[1:])))


class Pool(nn.Module):
    """[B, C, H, W] -> [B, C, *size]."""

    def __init__(self, size: Shape) -> None:
        super().__init__()
        self.size = size

    def forward(self, feature: Tensor) -> Tensor:
        return pooled(feature, self.size)


def _positions(shape: Shape) -> tuple[int, int]:
    """How many positions a feature has, and how wide each is."""
    if is_map(shape):
        return shape[1] * shape[2], shape[0]
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _sequence(feature: Tensor) -> Tensor:
    """[B, positions, width]."""
    if feature.ndim == 4:
        return feature.flatten(2).transpose(1, 2)
    return feature.unsqueeze(1) if feature.ndim == 2 else feature


def _misfit(name: str, student: Shape, teacher: Shape, takes: str) -> PlanError:
    what = f"adapter {name!r} does not lead from {list(student)} to {list(teacher)}"
    return PlanError(what, where="adapter", fix=f'{takes} Write adapter = "auto".')
