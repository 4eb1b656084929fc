"""What the figures show: plain points, taken from a result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeAlias

from ..chains import Table, ends_distillation

Points: TypeAlias = tuple[tuple[float, float], ...]

ROLE_COLORS = {"student": "#1d5fa6", "teacher": "#b4530a", "control": "#5f6368"}
OTHER_COLORS = ("#7a3e9d", "#1b7a4b", "#a61e4d", "#0b7285")
TERM_COLORS = ("#5b8fc7", "#c9822b", "#5f9e6e", "#9b72b0", "#8a8f98", "#c25b6e")


@dataclass(frozen=True)
class Series:
    """One line or band. ``dash`` is a word that CSS borders and matplotlib share: solid, dashed, dotted."""

    label: str
    points: Points
    color: str
    dash: str = "solid"


@dataclass(frozen=True)
class Stop:
    """Where a decision ended the distillation: an epoch, or a step of a stream."""

    at: float
    reason: str


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def unit(stage: Table) -> str:
    return "epoch" if stage["tick"] == "epoch" else "step"


def position(stage: Table, tick: int) -> int:
    """A tick, counted from 1, in the stage's unit."""
    return tick if stage["tick"] == "epoch" else int(tick * stage["tick"])


def points(stage: Table, curve: Sequence[Table], key: str) -> Points:
    """The finite values of ``key`` over epochs or steps."""
    pairs = zip(places(stage, curve), (number(entry.get(key)) for entry in curve), strict=True)
    return tuple((x, y) for x, y in pairs if y is not None)


def places(stage: Table, curve: Sequence[Table]) -> list[float]:
    """Where the entries of a curve stand, in the stage's unit."""
    epochs = [number(entry.get("epoch")) if stage["tick"] == "epoch" else None for entry in curve]
    return [position(stage, tick) if epoch is None else epoch for tick, epoch in enumerate(epochs, 1)]


def shown(result: Table, stage: Table) -> Iterator[tuple[str, Table]]:
    """Role and member of everything that a stage's figures compare: its members and the results that it reads."""
    yield from stage["members"].items()
    stages = {s["key"]: s for s in result["stages"]}
    for role, ref in stage["uses"].items():
        if ref["stage"] in stages and role not in stage["members"]:
            yield role, stages[ref["stage"]]["members"][ref["member"]]


def member_series(result: Table, stage: Table, key: str) -> list[Series]:
    """One line a member: solid if trained here, dashed if frozen (its level), dotted if read from another stage."""
    curves = [(role, member, points(stage, member["curve"], key)) for role, member in shown(result, stage)]
    xs = [x for _, _, line in curves for x, _ in line]
    level = {"accuracy": "monitor_accuracy"}.get(key, "")
    rest = iter(OTHER_COLORS * len(curves))
    series = []
    for role, member, line in curves:
        height, dash = number(member.get(level)), "solid" if role in stage["members"] else "dotted"
        if not line and xs and height is not None:
            line, dash = ((min(xs), height), (max(xs), height)), "dashed"
        series.append(Series(role, line, ROLE_COLORS.get(role) or next(rest), dash))
    return [s for s in series if len(s.points) > 1]


def share_series(stage: Table, role: str) -> list[Series]:
    """One band a term: its share of the gradient where that was measured, which takes two live terms."""
    series = term_series(stage, role, "share.")
    return series if len(series) > 1 else []


def term_series(stage: Table, role: str, prefix: str) -> list[Series]:
    """One line for each term, or pair of terms, of which a member's curve tells something under ``prefix``."""
    curve = stage["members"][role]["curve"]
    keys = list(dict.fromkeys(key for entry in curve for key in entry if key.startswith(prefix)))
    names = [key.removeprefix(prefix).replace(".", " and ") for key in keys]
    series = [Series(n, points(stage, curve, k), c) for n, k, c in zip(names, keys, cycle(TERM_COLORS), strict=False)]
    return [s for s in series if len(s.points) > 1]


def off_logits(stage: Table, role: str) -> list[str]:
    """Terms that a ledger passed over, since they do not act through the logits alone."""
    keys = dict.fromkeys(key for entry in stage["members"][role]["curve"] for key in entry)
    names = [key.removeprefix("train.") for key in keys if key.startswith("train.") and key.count(".") == 1]
    return [name for name in names if name != "loss" and f"train.norm.{name}" not in keys]


def stops(stage: Table) -> list[Stop]:
    """The decisions that ended the distillation, one for each place."""
    reasons: dict[float, list[str]] = {}
    for event in stage["events"]:
        at = number(event[unit(stage)])
        if at is not None and ends_distillation(stage, event):
            reasons.setdefault(at, []).append(event["reason"] or "")
    return [Stop(at, "; ".join(dict.fromkeys(filter(None, said)))) for at, said in sorted(reasons.items())]
