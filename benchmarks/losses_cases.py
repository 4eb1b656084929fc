"""What is timed: shapes, inputs, steps; and the check that everyone computes the same before it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from competitors import Objective, Way, ours
from torch import Tensor

DTYPES = ("float32", "bfloat16")
MODES = ("none", "class", "instance")
EVERYONE = (
    *("eager textbook", "eager careful A", "eager careful B"),
    *("compile textbook", "compile careful A", "compile careful B", "compile analytic"),
)
STRONGEST = ("compile careful A", "compile careful B", "compile analytic")

# relative to the largest element: loss, gradient; textbook code works in the logits' own type
TOLERANCES = {"float32": (1e-4, 1e-4), "bfloat16": (1e-4, 1e-2), "textbook bfloat16": (0.2, 0.1)}
CHUNK = 1024  # rows compared at a time

Data = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str
    objective: Objective
    against: tuple[str, ...]
    goal: bool = False  # one of the goals' cases: variants of ours and the machine's limits are timed beside it

    @property
    def size(self) -> tuple[int, int]:
        rows, classes = self.shape.split("x")
        return int(rows), int(classes)

    @property
    def name(self) -> str:
        return f"{self.objective.name} {self.dtype}"


def inputs(case: Case, device: str) -> Data:
    """A sure teacher, a student on its way there, classes of different mean and spread; the student is a leaf."""
    rows, classes = case.size
    source = torch.Generator(device).manual_seed(rows + classes)
    noise = partial(torch.randn, generator=source, device=device)
    labels = torch.randint(classes, (rows,), generator=source, device=device)
    teacher = noise(rows, classes) * (1.5 + noise(classes).abs()) + noise(classes)
    teacher[torch.arange(rows), labels] += 6 + 2 * noise(rows)
    student = 0.6 * teacher + noise(rows, classes)
    dtype = getattr(torch, case.dtype)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def step(way: Way, data: Data) -> Callable[[], None]:
    """Forward and backward through autograd, into a fresh .grad."""
    student, teacher, labels = data

    def call() -> None:
        student.grad = None
        way(student, teacher, labels).backward()

    return call


def result(way: Way, data: Data) -> tuple[Tensor, Tensor]:
    student = data[0]
    student.grad = None
    loss = way(*data)
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def exact(case: Case, data: Data) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the definition in float64."""
    student, teacher, labels = data
    return result(
        ours(case.objective, "reference"), (student.detach().double().requires_grad_(), teacher.double(), labels)
    )


def check(case: Case, name: str, found: Iterable[Tensor], truth: Iterable[Tensor]) -> list[float]:
    """The errors of loss and gradient; a ValueError if one is too large."""
    errors = [relative(one, other) for one, other in zip(found, truth, strict=True)]
    allowed = TOLERANCES["textbook bfloat16" if (name[-8:], case.dtype) == ("textbook", "bfloat16") else case.dtype]
    if not all(error <= limit for error, limit in zip(errors, allowed, strict=True)):
        raise ValueError(f"{case.shape} {case.name}: {name} is wrong: {errors}, allowed {allowed}")
    return errors


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest element; a part of the rows at a time, as both may fill the memory."""
    pairs = zip(
        *(z.detach().reshape(z.shape[0] if z.dim() else 1, -1).split(CHUNK) for z in (found, exact)), strict=True
    )
    tops = [((one.double() - other).abs().max(), other.abs().max().double()) for one, other in pairs]
    error, top = (torch.stack(values).max() for values in zip(*tops, strict=True))
    return (error / top).item()
