"""The claims of Si et al. 2025, each with a rule that says whether the figures measured here hold it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from dskd_figures import (
    DSKD,
    KD,
    PUBLISHED,
    accuracy,
    by_seed,
    columns,
    gain,
    mean_gain,
    one_assistant,
    published_gain,
    shown,
    stops,
    unit,
)
from tables import Spread, interval, paired

Table = Mapping[str, Any]

HELD, NOT_HELD, NOT_TESTABLE = "held", "not held", "not testable here"
NEAR, FAR, ABOUT = 0.25, 0.50, 0.10
CLAIMED_GAIN = {"mnist": 3.0, "svhn": 2.7}
COLLAPSE, RECOVERED = 5.0, 1.0
SETTINGS = (("main", "as in the recipe"), ("alpha", "alpha 0.9"), ("strong", "stronger teacher"))

Finding: TypeAlias = tuple[str, str]  # measured, verdict


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Args:
        number: 1 to 5.
        text: what it says.
        table: what the paper's own table says of it.
        rule: when it counts as held.
        findings: (setting, what was measured, verdict).
    """

    number: int
    text: str
    table: str
    rule: str
    findings: tuple[tuple[str, str, str], ...]


def claims(content: Table) -> list[Claim]:
    """All claims, judged by the figures of the parts that are there."""
    return [*_own(content), *_elsewhere(content["data"])]


def _own(content: Table) -> Iterator[Claim]:
    """The claims on the data set of the table."""
    data = content["data"]
    gained = f"{published_gain(data):+.2f} points" if data in PUBLISHED else ""
    yield Claim(
        1,
        "The assistant nearest the student is the best one.",
        _best_single(data),
        "under DSKD it is above every other chain with one assistant, by the 95 % intervals of all paired differences",
        _judged(content, _nearest),
    )
    yield Claim(
        2,
        f"KD stops at about {NEAR:.0%} of the epochs for near sizes and at {FAR:.0%} for far ones.",
        "says nothing of stops",
        f"the mean share over neighbouring sizes is {NEAR:.0%}, the direct student's {FAR:.0%}, give or take "
        f"{100 * ABOUT:.0f} points",
        _judged(content, _when_it_stops),
    )
    if data in CLAIMED_GAIN:
        yield Claim(
            3,
            f"DSKD gains {CLAIMED_GAIN[data]:g} points on average.",
            gained,
            "the 95 % interval of the mean gain over the paper's chains lies above 0 and reaches the claimed gain",
            _judged(content, _gains_as_claimed),
        )
    yield Claim(
        3, "DSKD is better than KD on average.", gained, "the same interval lies above 0", _judged(content, _gains)
    )
    yield Claim(
        4,
        "The collapsed chains recover without the cap on the epochs.",
        _collapsed(data),
        f"a chain whose DSKD was {COLLAPSE:g} points or more below KD is within {RECOVERED:g} point of it after longer "
        "training; where nothing collapses there is nothing to test",
        tuple(_recovery(content)),
    )
    yield Claim(
        5,
        "The chain that the table lacks would not be the best.",
        "lacks it",
        "under DSKD the 95 % interval of what it is above the best other chain lies below 0",
        _judged(content, _missing_chain),
    )


def _judged(content: Table, judge: Callable[[Table], Finding]) -> tuple[tuple[str, str, str], ...]:
    """A finding for every setting that ran."""
    found = [(name, unit(content, part)) for part, name in SETTINGS]
    findings = tuple((name, *judge(run)) for name, run in found if run is not None)
    return findings or (("", "not run", NOT_TESTABLE),)


def _verdict(found: Iterable[Spread | None], holds: Callable[[float, float], bool]) -> str:
    """By the bounds of every interval; where one is missing (no figure, or one seed) nothing can be said."""
    bounds = [(None, None) if spread is None else (spread.low, spread.high) for spread in found]
    known = [(low, high) for low, high in bounds if low is not None and high is not None]
    if len(known) < len(bounds):
        return NOT_TESTABLE
    return HELD if all(holds(low, high) for low, high in known) else NOT_HELD


def _shown(found: Spread | None) -> str:
    return "not measured" if found is None else f"{interval(found)} points"


# ---------------------------------------------------------------- one judge a claim


def _nearest(run: Table) -> Finding:
    *others, nearest = one_assistant(run)
    ours = by_seed(run, nearest, DSKD)
    found = {other: paired(ours, by_seed(run, other, DSKD)) for other in others}
    text = "; ".join(f"{nearest} less {other} {_shown(difference)}" for other, difference in found.items())
    return text, _verdict(found.values(), lambda low, high: low > 0)


def _when_it_stops(run: Table) -> Finding:
    direct, sizes = columns(run)[0], run["protocol"]["models"]
    neighbours = set(pairwise(sizes))
    near = [stop.share for stop in stops(run) if _last_step(stop.chain, sizes) in neighbours]
    far = [stop.share for stop in stops(run) if stop.chain == direct]
    if not near or not far:
        return "not measured", NOT_TESTABLE
    shares = statistics.fmean(near), statistics.fmean(far)
    held = abs(shares[0] - NEAR) <= ABOUT and abs(shares[1] - FAR) <= ABOUT
    text = f"near {shares[0]:.0%} (mean of {len(near)} stages), far {shares[1]:.0%}"
    return text, HELD if held else NOT_HELD


def _last_step(chain: str, models: list[str]) -> tuple[str, str]:
    """The models of a chain's last stage, out of its name."""
    names = {model.rpartition("-")[2]: model for model in models}
    parts = chain.split(" > ") if " > " in chain else [names[size] for size in chain.split("-")]
    return parts[-2], parts[-1]


def _gains_as_claimed(run: Table) -> Finding:
    found = mean_gain(run, columns(run)[:-1])
    claimed = CLAIMED_GAIN[run["protocol"]["data"]["name"]]
    return _shown(found), _verdict([found], lambda low, high: low > 0 and high >= claimed)


def _gains(run: Table) -> Finding:
    found = mean_gain(run, columns(run)[:-1])
    return _shown(found), _verdict([found], lambda low, high: low > 0)


def _missing_chain(run: Table) -> Finding:
    *others, missing = columns(run)
    best = max(others, key=lambda chain: statistics.fmean(by_seed(run, chain, DSKD).values() or [0.0]))
    ours, found = accuracy(run, missing, DSKD), paired(by_seed(run, missing, DSKD), by_seed(run, best, DSKD))
    if ours is None:
        return "not measured", NOT_TESTABLE
    text = f"{missing} {ours.mean:.2f}; less {best} {_shown(found)}"
    return text, _verdict([found], lambda low, high: high < 0)


def _recovery(content: Table) -> Iterator[tuple[str, str, str]]:
    """Of the chains of the long runs that collapse in the paper's table: those with its smallest candidate."""
    main, long = unit(content, "main"), unit(content, "long")
    if main is None or long is None:
        yield "", "not run", NOT_TESTABLE
        return
    for chain in columns(long)[-2:]:
        short, longer = gain(main, chain), gain(long, chain)
        if short is None or longer is None:
            yield chain, "not measured", NOT_TESTABLE
            continue
        epochs = [run["protocol"]["train"]["epochs"] for run in (main, long)]
        text = f"DSKD less KD {_shown(short)} after {epochs[0]} epochs, {_shown(longer)} after {epochs[1]}"
        collapsed = short.mean <= -COLLAPSE
        recovered = HELD if longer.mean >= -RECOVERED else NOT_HELD
        yield chain, text, recovered if collapsed else NOT_TESTABLE


# ---------------------------------------------------------------- what the paper's table says


def _best_single(data: str) -> str:
    if data not in PUBLISHED:
        return ""
    singles = PUBLISHED[data][DSKD][1:4]
    best = ("the one farthest from the student", "the middle one", "the one nearest the student")
    return f"best is {best[singles.index(max(singles))]} ({' / '.join(f'{value:.2f}' for value in singles)})"


def _collapsed(data: str) -> str:
    if data not in PUBLISHED:
        return ""
    falls = [ours - theirs for ours, theirs in zip(PUBLISHED[data][DSKD], PUBLISHED[data][KD], strict=True)]
    found = [f"{fall:+.2f}" for fall in falls if fall <= -COLLAPSE]
    return f"{len(found)} chains collapse: {' and '.join(found)} points" if found else "none collapses"


def _elsewhere(data: str) -> Iterator[Claim]:
    """The claims on other data sets, whose tables were not run."""
    absent = (("", "not run on these data", NOT_TESTABLE),)
    for other in PUBLISHED:
        if other != data:
            name = shown(other)
            yield Claim(
                1, f"{name}: the assistant nearest the student is the best one.", _best_single(other), "", absent
            )
            if other in CLAIMED_GAIN:
                text = f"{name}: DSKD gains {CLAIMED_GAIN[other]:g} points on average."
                yield Claim(3, text, f"{published_gain(other):+.2f} points", "", absent)
