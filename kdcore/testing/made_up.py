"""Made-up outputs and batches for losses, in the shapes that a loss asks for."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..data import Batch
from ..options import Options
from ..outputs import Outputs, Shapes
from ..registry import Catalog
from ..training.adapters import adapter_builder

Change: TypeAlias = Callable[[Tensor], Tensor]
CLASSES, ROWS, SAMPLES = 5, 6, 64
PATTERN = re.compile(r"[*?]*\[[^]]*\]|[*?]+")  # what stands for something else in a tap's name
VECTOR, MAP, TOKENS = ((6,), (8,)), ((4, 4, 4), (6, 4, 4)), ((5, 6), (5, 8))  # shapes of student's and teacher's tap


def build(loss: Any, options: Options, catalog: Catalog, seed: int = 0) -> nn.Module:
    """A registered loss as the framework builds it, with adapters drawn under ``seed``.

    Taps get shapes of their own: another width in the teacher than in the student, equal ones where the loss cannot
    compare different widths.
    """
    return _fitting(loss, options, catalog, seed)[0]


def _fitting(loss: Any, options: Options, catalog: Catalog, seed: int) -> tuple[nn.Module, Shapes]:
    problem: Exception | None = None
    adapter = adapter_builder(options, catalog)
    for shapes in (replace(found, adapter=adapter) for found in _candidates(loss, options)):
        try:
            module = _build(loss, options, shapes, seed)
            value(module, make_up(shapes, loss, options))
        except Exception as error:
            problem = problem or error
        else:
            return module, shapes
    assert problem is not None
    raise problem


def _build(loss: Any, options: Options, shapes: Shapes, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = loss.build(shapes, options)
    return module


def _candidates(loss: Any, options: Options) -> Iterator[Shapes]:
    """Shapes of taps to try: maps and vectors by name, then all of a kind; different widths, then equal ones."""
    own, other = loss.taps(options) if "taps" in loss.needs else ((), ())
    own, other = _named(own), _named(other)
    labels = torch.arange(SAMPLES) % CLASSES

    def shapes(names: Sequence[str], kind: Any, teacher: bool) -> dict[str, tuple[int, ...]]:
        return {name: (kind or (VECTOR if name == "pooled" else MAP))[teacher] for name in names}

    for teacher in (True, False):
        for kind in (None, MAP, VECTOR, TOKENS) if own or other else (None,):
            found = shapes(own, kind, False), shapes(other, kind, teacher)
            norms = {tap: (torch.ones(shape[0]), torch.zeros(shape[0])) for tap, shape in found[1].items()}
            yield Shapes(CLASSES, SAMPLES, *found, labels, norms)


def _named(patterns: Sequence[str]) -> list[str]:
    """Names for taps: of a pattern there are three."""
    return [PATTERN.sub(digit, p) for p in patterns for digit in ("123" if PATTERN.search(p) else "1")]


@dataclass(frozen=True)
class Given:
    """What a loss gets: the student's outputs, the source's, and the batch."""

    student: Outputs
    teacher: Outputs | None
    batch: Batch

    def leaves(self, teacher: bool = False) -> list[Tensor]:
        """Logits and taps of the student, or of the teacher."""
        side = self.teacher if teacher else self.student
        return [] if side is None else [side.logits, *side.taps.values()]

    def take(self, index: Tensor) -> Given:
        """The rows at ``index`` [M], int64."""
        old = self.batch
        batch = Batch(old.inputs[index], old.target[index], old.index[index], old.epoch)
        return replace(self.map(lambda tensor: tensor[index]), batch=batch)

    def to(self, device: str) -> Given:
        """A copy without gradients on another device."""
        old = self.batch
        batch = Batch(old.inputs.to(device), old.target.to(device), old.index.to(device), old.epoch)
        return replace(self.map(lambda tensor: tensor.detach().to(device)), batch=batch)

    def map(self, function: Change) -> Given:
        """With ``function`` applied to logits and taps of both sides."""
        return self.map_student(function).map_teacher(function)

    def map_student(self, function: Change) -> Given:
        """With ``function`` applied to the student's logits and taps."""
        return replace(self, student=_mapped(self.student, function))

    def map_teacher(self, function: Change) -> Given:
        """With ``function`` applied to the teacher's logits and taps, if there is one."""
        return self if self.teacher is None else replace(self, teacher=_mapped(self.teacher, function))


def _mapped(side: Outputs, function: Change) -> Outputs:
    return Outputs(function(side.logits), {name: function(tap) for name, tap in side.taps.items()})


def make_up(
    shapes: Shapes,
    loss: Any,
    options: Options,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Given:
    """Random outputs of :data:`ROWS` samples; the student's require a gradient. Losses on labels have no teacher."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def outputs(taps: Mapping[str, tuple[int, ...]]) -> Outputs:
        return Outputs(draw(CLASSES), {name: draw(*shape) for name, shape in taps.items()})

    target = torch.arange(ROWS) % CLASSES
    batch = Batch(draw(1, 8, 8).float(), target, torch.randperm(SAMPLES, generator=generator)[:ROWS], 0.0)
    student, teacher = outputs(shapes.student), outputs(shapes.teacher)
    alone = getattr(type(options), "on_labels", False)
    return Given(student, None if alone else teacher, batch).map_student(Tensor.requires_grad_)


@dataclass(frozen=True)
class Made:
    """A loss that was built, and inputs of the right shapes for it."""

    loss: Any
    options: Options
    shapes: Shapes
    module: nn.Module

    @classmethod
    def of(cls, loss: Any, options: Options, catalog: Catalog, seed: int = 0) -> Made:
        module, shapes = _fitting(loss, options, catalog, seed)
        return cls(loss, options, shapes, module)

    def again(self, options: Options | None = None, seed: int = 0) -> nn.Module:
        """Built anew, with other options or another seed of its adapters."""
        return _build(self.loss, options or self.options, self.shapes, seed)

    def given(self, **how: Any) -> Given:
        """Inputs; ``how`` as for :func:`make_up`."""
        return make_up(self.shapes, self.loss, self.options, **how)


@contextmanager
def seeded() -> Iterator[None]:
    """One seed for torch's global generator, as the framework sets one for each step; put back after the block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def value(module: nn.Module, given: Given) -> Tensor:
    """What a loss gives, dicts summed: from a copy of the module, under one seed, so that calls do not depend on the
    ones before.
    """
    with seeded():
        return total(copy.deepcopy(module)(given.student, given.teacher, given.batch))


def draws(module: nn.Module, given: Given) -> bool:
    """True if a loss draws random numbers, which samples get by their place in the batch."""
    with seeded():
        before = torch.get_rng_state()
        copy.deepcopy(module)(given.student, given.teacher, given.batch)
        return not torch.equal(torch.get_rng_state(), before)


def total(found: Any) -> Tensor:
    """A scalar, or the sum of a dict of scalars."""
    return torch.stack(list(found.values())).sum() if isinstance(found, dict) else torch.as_tensor(found)


def gradients(module: nn.Module, given: Given, teacher: bool = False) -> list[Tensor | None]:
    """Gradients of the loss for logits and taps of one side; None where it does not depend on them."""
    found, leaves = value(module, given), given.leaves(teacher)
    return list(torch.autograd.grad(found, leaves, allow_unused=True)) if found.requires_grad else [None] * len(leaves)
