"""Numbers as people read them; a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from .curves import number

NONE = "–"


def percent(value: Any) -> str:
    share = number(value)
    return NONE if share is None else f"{100 * share:.2f}\u00a0%"


def signed_points(value: Any) -> str:
    """A difference of shares in percentage points."""
    share = number(value)
    return NONE if share is None else f"{100 * share:+.2f}"


def weight(margin: Any, error: Any) -> str:
    """What the margin of a choice is worth against its standard error; empty where one of them is unknown."""
    gap, noise = number(margin), number(error)
    if gap is None or noise is None:
        return ""
    return "a tie" if gap == 0 else "within noise" if abs(gap) <= noise else "above noise"


def spread(values: Sequence[Any], shown: Callable[[Any], str] = percent) -> str:
    """The mean of a number under several seeds, and their standard deviation: 97.21 % ± 0.12."""
    found = [value for value in map(number, values) if value is not None]
    middle = shown(mean(found) if found else None)
    return f"{middle}\u00a0±\u00a0{100 * stdev(found):.2f}" if len(found) > 1 else middle


def count(value: Any) -> str:
    whole = number(value)
    return NONE if whole is None else f"{whole:,.0f}"


def counted(value: Any, noun: str) -> str:
    """``1 stage``, ``2 stages``."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def place(value: Any) -> str:
    """An epoch or a step, which a mean over seeds may put between two."""
    at = number(value)
    return NONE if at is None else f"{at:,.1f}".removesuffix(".0")


def scaled(value: Any) -> str:
    """Three digits and a prefix: 12.4 M."""
    size = number(value)
    if size is None or abs(size) < 1000:
        return count(size)
    power = min(int(math.log10(abs(size)) // 3), 6)
    power += abs(size) >= 999.5 * 1000**power and power < 6  # three digits of it are the next prefix's 1
    return f"{size / 1000**power:.3g}\u00a0{' kMGTPE'[power]}"


def flops(value: Any) -> str:
    """``12.4 MFLOPs``, for a terminal."""
    size, _, prefix = scaled(value).partition("\u00a0")
    return f"{size} {prefix}FLOPs"


def seconds(value: Any) -> str:
    time = number(value)
    if time is None or time < 60:
        return NONE if time is None else f"{time:.1f}\u00a0s"
    minutes, hours = int(time // 60), int(time // 3600)
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min {int(time % 60):02} s"


def milliseconds(value: Any) -> str:
    time = number(value)
    return NONE if time is None else f"{time:.3g}\u00a0ms"


def ratio(larger: Any, smaller: Any) -> str:
    over, under = number(larger), number(smaller)
    return f"{over / under:.3g}\u00a0×" if over is not None and under else NONE
