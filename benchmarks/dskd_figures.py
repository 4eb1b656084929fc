"""Figures of the table of DSKD out of its JSON: means, spreads, paired differences, stop epochs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tables import Spread, paired, spread

from kdcore.chains import label

Table = Mapping[str, Any]

KD, DSKD = "KD", "DSKD"
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "mnist": {
        KD: (97.43, 96.69, 97.21, 97.41, 97.33, 97.26, 97.36),
        DSKD: (97.62, 97.44, 97.31, 78.02, 87.68, 97.68, 97.68),
    },
    "cifar10": {
        KD: (86.49, 86.76, 86.71, 86.78, 86.77, 86.26, 86.33),
        DSKD: (86.53, 86.79, 86.76, 86.84, 86.79, 86.27, 86.41),
    },
    "svhn": {
        KD: (92.67, 92.09, 92.99, 92.92, 90.56, 91.44, 92.04),
        DSKD: (94.70, 93.84, 94.45, 94.44, 94.07, 94.35, 94.63),
    },
}
"""Test accuracies in percent, in the order of :func:`columns`, whose last the paper does not have."""


def shown(data: str) -> str:
    """A data set's name for people."""
    return data.upper().replace("CIFAR10", "CIFAR-10")


def unit(content: Table, part: str, name: str = "") -> Table | None:
    """The only run of a part, or the one with this name; None if it is not finished."""
    return next((run for run in content["parts"].get(part, ()) if name in ("", run["name"])), None)


def columns(run: Table) -> list[str]:
    """The chains of a run as the paper orders them; of three candidates it lacks that of the two largest: last here."""
    teacher, *candidates, student = run["protocol"]["models"]
    chosen = [middle for count in range(len(candidates) + 1) for middle in combinations(candidates, count)]
    if len(candidates) == 3:
        chosen.append(chosen.pop(4))
    return [label((teacher, *middle, student)) for middle in chosen]


def one_assistant(run: Table) -> list[str]:
    """The chains with one assistant, the largest first."""
    return columns(run)[1 : len(run["protocol"]["models"]) - 1]


def variants(run: Table) -> list[str]:
    return [KD, DSKD] if run["protocol"]["baseline"] else [DSKD]


def by_seed(run: Table, chain: str, variant: str, measure: str = "test") -> dict[int, float]:
    """Seed -> accuracy in percent."""
    rows = [row for row in run["chains"] if (row["chain"], row["variant"]) == (chain, variant)]
    return {row["seed"]: 100 * row[measure] for row in rows}


def accuracy(run: Table, chain: str, variant: str, measure: str = "test") -> Spread | None:
    """Percent over seeds."""
    return spread(by_seed(run, chain, variant, measure).values())


def labels_by_seed(run: Table, model: str, role: str) -> dict[int, float]:
    """Seed -> test accuracy in percent of a model that learned from labels alone, as a teacher or as a control."""
    rows = [row for row in run["labels"] if (row["model"], row["role"]) == (model, role)]
    return {row["seed"]: 100 * row["test"] for row in rows}


def on_labels(run: Table, model: str, role: str) -> Spread | None:
    """The same over seeds."""
    return spread(labels_by_seed(run, model, role).values())


def gain(run: Table, chain: str) -> Spread | None:
    """What the dynamic stop adds to a chain, in points."""
    return paired(by_seed(run, chain, DSKD), by_seed(run, chain, KD))


def mean_gain(run: Table, chains: Sequence[str]) -> Spread | None:
    """The same as a mean over chains, a value a seed."""
    ours, theirs = ({chain: by_seed(run, chain, variant) for chain in chains} for variant in (DSKD, KD))
    seeds = set.intersection(*({*ours[c]} & {*theirs[c]} for c in chains))
    return spread(statistics.fmean(ours[c][seed] - theirs[c][seed] for c in chains) for seed in sorted(seeds))


def published_gain(data: str) -> float:
    """The mean difference of the paper's own rows, in points."""
    found = PUBLISHED[data]
    return statistics.fmean(found[DSKD]) - statistics.fmean(found[KD])


@dataclass(frozen=True)
class Stops:
    """Of a distilled stage: seed -> the epoch after which it went on with labels alone; None if it never did."""

    chain: str
    epochs: int
    by_seed: Mapping[int, int | None]

    @property
    def share(self) -> float:
        """Of the epochs with distillation, a mean over seeds; one that never stopped distilled in all of them."""
        return statistics.fmean((stop or self.epochs) / self.epochs for stop in self.by_seed.values())


def stops(run: Table) -> list[Stops]:
    """Of every stage under the dynamic stop, in the order of their chains' lengths."""
    found: dict[str, dict[int, int | None]] = {}
    epochs = 0
    for row in run["chains"]:
        if row["variant"] == DSKD:
            found.setdefault(row["chain"], {})[row["seed"]] = row["stop"]
            epochs = row["epochs"]
    return [Stops(chain, epochs, found[chain]) for chain in found]
