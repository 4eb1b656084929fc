"""The claims of Si et al. 2025, each with a rule that says whether the figures measured here hold it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from dskd_figures import (
    DSKD,
    KD,
    PUBLISHED,
    Spread,
    accuracy,
    by_seed,
    columns,
    gain,
    mean_gain,
    one_assistant,
    paired,
    published_gain,
    stops,
    unit,
)

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
    data = content["data"]
    return [
        _claim(content, 1, "The assistant nearest the student is the best one.", _best_single(data),
               "Under DSKD, every other chain with one assistant is worse: all 95 % intervals of the paired "
               "differences lie above 0.", _nearest),
        _claim(content, 2, f"KD stops at about {NEAR:.0%} of the epochs for near sizes and at {FAR:.0%} for far ones.",
               "says nothing of stops", f"The mean over neighbouring sizes is within {ABOUT:.0%} of {NEAR:.0%}, that "
               f"of the direct student within {ABOUT:.0%} of {FAR:.0%}.", _when_it_stops),
        _claim(content, 3, _claimed_gain(data), f"{published_gain(data):+.2f} points" if data in PUBLISHED else "",
               "The 95 % interval of the mean gain over the table's chains includes the claimed gain or lies above it.",
               _gains_as_claimed),
        _claim(content, 3, "DSKD is better than KD on average.",
               f"{published_gain(data):+.2f} points" if data in PUBLISHED else "",
               "That interval lies above 0.", _gains_at_all),
        Claim(4, "The collapsed chains recover without the cap on the epochs.", _collapsed(data),
              f"Collapsed: DSKD is {COLLAPSE:g} points or more below KD. Held if such a chain, trained for longer, is "
              f"within {RECOVERED:g} point of KD. Where nothing collapses there is nothing to test.",
              tuple(_recovery(content))),
        _claim(content, 5, "The chain that the table lacks would not be the best.", "lacks it",
               "Under DSKD it is not above the best other chain: the 95 % interval of the paired difference does not "
               "lie above 0.", _missing_chain),
        *_elsewhere(data),
    ]  # fmt: skip


def _claim(
    content: Table, number: int, text: str, table: str, rule: str, judge: Callable[[str, Table], Finding]
) -> Claim:
    found = [(name, unit(content, part)) for part, name in SETTINGS]
    findings = tuple((name, *judge(content["data"], run)) for name, run in found if run is not None)
    return Claim(number, text, table, rule, findings or (("", "not run", NOT_TESTABLE),))


def _verdict(held: bool) -> str:
    return HELD if held else NOT_HELD


def _shown(found: Spread | None, unit_name: str = " points") -> str:
    if found is None:
        return "not measured"
    inside = "" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.mean:+.2f}{inside}{unit_name}"


def _above(found: Spread | None, bound: float) -> bool:
    return found is not None and found.low is not None and found.low > bound


# ---------------------------------------------------------------- one judge a claim


def _nearest(data: str, run: Table) -> Finding:
    *others, nearest = one_assistant(run)
    ours = by_seed(run, nearest, DSKD)
    found = {other: paired(ours, by_seed(run, other, DSKD)) for other in others}
    text = "; ".join(f"{nearest} less {other} {_shown(difference)}" for other, difference in found.items())
    return text, _verdict(all(_above(difference, 0) for difference in found.values()))


def _when_it_stops(data: str, run: Table) -> Finding:
    direct, sizes = columns(run)[0], run["protocol"]["models"]
    neighbours = set(pairwise(sizes))
    near = [stop.share for stop in stops(run) if _last_step(stop.chain, sizes) in neighbours]
    far = [stop.share for stop in stops(run) if stop.chain == direct]
    if not near or not far:
        return "not measured", NOT_TESTABLE
    shares = statistics.fmean(near), statistics.fmean(far)
    held = abs(shares[0] - NEAR) <= ABOUT and abs(shares[1] - FAR) <= ABOUT
    text = f"near {shares[0]:.0%} (mean of {len(near)} stages), far {shares[1]:.0%}"
    return text, _verdict(held)


def _last_step(chain: str, models: list[str]) -> tuple[str, str]:
    """The models of a chain's last stage, out of its name."""
    names = {model.rpartition("-")[2]: model for model in models}
    parts = chain.split(" > ") if " > " in chain else [names[size] for size in chain.split("-")]
    return parts[-2], parts[-1]


def _gains_as_claimed(data: str, run: Table) -> Finding:
    if data not in CLAIMED_GAIN:
        return "the paper claims no gain for these data", NOT_TESTABLE
    found = mean_gain(run, _published_columns(run))
    held = found is not None and found.high is not None and found.high >= CLAIMED_GAIN[data]
    return _shown(found), _verdict(held)


def _gains_at_all(data: str, run: Table) -> Finding:
    found = mean_gain(run, _published_columns(run))
    return _shown(found), _verdict(_above(found, 0))


def _missing_chain(data: str, run: Table) -> Finding:
    *others, missing = columns(run)
    best = max(others, key=lambda chain: statistics.fmean(by_seed(run, chain, DSKD).values() or [0.0]))
    ours, found = accuracy(run, missing, DSKD), paired(by_seed(run, missing, DSKD), by_seed(run, best, DSKD))
    if ours is None or found is None:
        return "not measured", NOT_TESTABLE
    held = found.low is None or found.low <= 0
    return f"{missing} {ours.mean:.2f} %, less {best} {_shown(found)}", _verdict(held)


def _published_columns(run: Table) -> list[str]:
    return columns(run)[:-1]


def _recovery(content: Table) -> Iterator[tuple[str, str, str]]:
    """Of the chains that collapse in the paper's table: the first that ends in the smallest candidate, and the next."""
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
        yield chain, text, _verdict(longer.mean >= -RECOVERED) if collapsed else NOT_TESTABLE


# ---------------------------------------------------------------- what the paper's table says


def _best_single(data: str) -> str:
    if data not in PUBLISHED:
        return ""
    singles = PUBLISHED[data][DSKD][1:4]
    best = ("farthest from", "between the other two from", "nearest")[singles.index(max(singles))]
    return f"best is the one {best} the student ({' / '.join(f'{value:.2f}' for value in singles)})"


def _claimed_gain(data: str) -> str:
    gain = CLAIMED_GAIN.get(data)
    return f"DSKD gains {gain:g} points on average." if gain else "DSKD gains on average."


def _collapsed(data: str) -> str:
    if data not in PUBLISHED:
        return ""
    falls = [ours - theirs for ours, theirs in zip(PUBLISHED[data][DSKD], PUBLISHED[data][KD], strict=True)]
    found = [f"{fall:+.2f}" for fall in falls if fall <= -COLLAPSE]
    return f"two chains collapse: {' and '.join(found)} points" if found else "none collapses"


def _elsewhere(data: str) -> Iterator[Claim]:
    """The claims on other data sets, whose tables were not run."""
    absent = (("", "not run on these data", NOT_TESTABLE),)
    for other in PUBLISHED:
        if other != data:
            name = other.upper().replace("CIFAR10", "CIFAR-10")
            yield Claim(
                1, f"{name}: the assistant nearest the student is the best one.", _best_single(other), "", absent
            )
            if other in CLAIMED_GAIN:
                text = f"{name}: {_claimed_gain(other)}"
                yield Claim(3, text, f"{published_gain(other):+.2f} points", "", absent)
