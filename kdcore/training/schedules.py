"""Factors of a weight or a learning rate as functions of the epoch. In a stream, an epoch is a tick."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import SupportsFloat

from ..plan import Schedule
from ..registry import Catalog
from .options import ConstantOptions, CosineOptions, StepOptions


def constant(epoch: float, length: int, options: ConstantOptions) -> float:
    """Always 1."""
    return 1.0


def cosine(epoch: float, length: int, options: CosineOptions) -> float:
    """Half a cosine from 1 to ``floor`` at ``length`` (SGDR without restarts, Loshchilov & Hutter 2017)."""
    share = min(epoch / length, 1.0) if length else 1.0
    return options.floor + (1 - options.floor) * 0.5 * (1 + math.cos(math.pi * share))


def step(epoch: float, length: int, options: StepOptions) -> float:
    """``gamma`` to the number of milestones reached."""
    return options.gamma ** sum(epoch >= milestone for milestone in options.milestones)


def compile_schedule(schedule: Schedule, catalog: Catalog, length: int) -> Callable[[float, float], float]:
    """Warm-up times shape, without the value, which a knob may change.

    Returns:
        A function of ``epoch``, the epochs that are over (for the shape), and ``warm``, the epochs counted so that the
        first is 1 (for the warm-up).
    """
    entry = catalog.find("schedule", schedule.shape.name)
    shape, options = entry.load(), entry.options_class()(**schedule.shape.options)

    def factor(epoch: float, warm: float) -> float:
        ramp = min(warm / schedule.warmup_epochs, 1.0) if schedule.warmup_epochs else 1.0
        value = shape(epoch, length, options)
        entry.expect(value, (float, SupportsFloat), "a number")
        return ramp * float(value)

    return factor


def as_schedule(value: float | Schedule) -> Schedule:
    """A plain number is a constant schedule."""
    return value if isinstance(value, Schedule) else Schedule(float(value))
