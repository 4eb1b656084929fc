"""Accuracy over epochs of the same learner in several stages: under several seeds, with and without controllers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from ..chains import Table, stop
from .curves import Points, Series, number, points, unit

COLORS = ("#1d5fa6", "#1b7a4b", "#7a3e9d", "#0b7285")
PLAIN = "#b4530a"
NEAR = 0.005
"""A learner within half a point of its own final accuracy has converged."""


@dataclass(frozen=True)
class Variant:
    """One learner over its stages.

    Args:
        name: "with dskd", or "without controllers".
        series: the mean of its curves.
        band: place, lowest and highest of them.
        stops: where its distillation ended, in the stages in which it did.
        stages: how many they are.
        final: mean accuracy at the curves' ends.
        converged: mean place where a curve first was near its own end; None without curves.
        share: mean share of a stage's length at which distillation ended; None if it never did.
    """

    name: str
    series: Series
    band: tuple[tuple[float, float, float], ...]
    stops: tuple[float, ...]
    stages: int
    final: float | None
    converged: float | None
    share: float | None


def variants(found: Iterable[tuple[tuple[str, ...], Table, str]]) -> tuple[Variant, ...]:
    """The averages of one learner by its controllers, without any last.

    Args:
        found: controllers, stage and member of each of its trainings.
    """
    own: dict[tuple[str, ...], list[tuple[Table, str]]] = {}
    for controllers, stage, member in found:
        own.setdefault(controllers, []).append((stage, member))
    colors = iter(COLORS * len(own))
    ordered = sorted(own.items(), key=lambda item: (not item[0], item[0]))
    return tuple(_variant(with_them, same, next(colors) if with_them else PLAIN) for with_them, same in ordered)


def _variant(controllers: tuple[str, ...], found: Sequence[tuple[Table, str]], color: str) -> Variant:
    lines = [points(stage, stage["members"][member]["curve"], "accuracy") for stage, member in found]
    lines = [line for line in lines if line]
    heights: dict[float, list[float]] = {}
    for x, y in (point for line in lines for point in line):
        heights.setdefault(x, []).append(y)
    name, dash = (f"with {' + '.join(controllers)}", "solid") if controllers else ("without controllers", "dashed")
    ends = [(stage, end) for stage, _ in found if (end := stop(stage)) is not None]
    return Variant(
        name=name,
        series=Series(name, tuple((x, mean(heights[x])) for x in sorted(heights)), color, dash),
        band=tuple((x, min(heights[x]), max(heights[x])) for x in sorted(heights)),
        stops=tuple(at for stage, end in ends if (at := number(end[unit(stage)])) is not None),
        stages=len(found),
        final=_mean(line[-1][1] for line in lines),
        converged=_mean(_converged(line) for line in lines),
        share=_mean(end["tick"] / stage["ticks"] for stage, end in ends if stage["ticks"]),
    )


def _converged(line: Points) -> float:
    """Where the curve first was near its own end."""
    return next(x for x, y in line if y >= line[-1][1] - NEAR)


def _mean(found: Iterable[float]) -> float | None:
    values = list(found)
    return mean(values) if values else None
