"""Cells and sections of the page of the table of DSKD that tell of single runs: chains, stops, sweeps, costs, goals."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dskd_figures import DSKD, accuracy, columns, gain, on_labels, stops, unit, variants
from tables import interval, plus_minus, table

from kdcore.cli.tree import choice_text

Table = Mapping[str, Any]

MOST_OVERHEAD = 1.25
MOST_MINUTES = 40
COST_HEADS = (
    "run", "stages", "more without sharing", "stopped", "TFLOPs: students", "teachers", "controls", "first teachers",
    "saved by stopping", "saved by sharing", "stage minutes", "(DSKD + controls) / KD, FLOPs", "the same, seconds",
    "shared DSKD / KD chain by chain, FLOPs", "the same, seconds",
)  # fmt: skip


# ---------------------------------------------------------------- cells


def accuracies(run: Table, variant: str, name: str, measure: str = "test") -> list[str]:
    """A row: every chain."""
    return [name, *(plus_minus(accuracy(run, chain, variant, measure)) for chain in columns(run))]


def gains(run: Table, name: str) -> list[str]:
    """A row: what the dynamic stop adds to every chain."""
    return [name, *(interval(gain(run, chain)) for chain in columns(run))]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------- sections of one run


def chains(run: Table) -> str:
    """Accuracies of a part with chains of its own, its teacher, and its stops."""
    rows = [accuracies(run, variant, variant) for variant in variants(run)]
    rows += [gains(run, "DSKD - KD")] if len(rows) == 2 else []
    about = run["protocol"]
    options = {**about["teacher"], **about["train"]["teacher"]}
    teacher = ", ".join(f"{key} {value}" for key, value in options.items())
    text = f"{about['train']['epochs']} epochs; the first teacher: {teacher}.\n\n"
    return f"{text}{table(['', *columns(run)], rows)}\n{labels(run)}\n{stop_epochs(run)}"


def labels(run: Table) -> str:
    """What teachers and controls reach."""
    roles = dict.fromkeys((row["role"], row["model"]) for row in run["labels"])
    texts = [f"{model} {plus_minus(on_labels(run, model, role))} ({role})" for role, model in sorted(roles)]
    return f"On labels alone: {', '.join(texts)}.\n"


def stop_epochs(run: Table) -> str:
    """Every distilled stage under the dynamic stop, seed by seed."""
    found = stops(run)
    seeds = run["protocol"]["seeds"]
    rows = [
        (stop.chain, *(_epoch(stop.by_seed.get(seed)) for seed in seeds),
         f"{stop.share * stop.epochs:.1f}", f"{stop.share:.0%}")
        for stop in found
    ]  # fmt: skip
    text = f"The epoch, of {found[0].epochs}, after which the last model of a chain went on with labels alone"
    text += "; one that never did counts with all epochs:\n\n"
    return text + table(("stage", *(f"seed {seed}" for seed in seeds), "mean", "share of the epochs"), rows)


def _epoch(stop: int | None) -> str:
    return "never" if stop is None else str(stop)


def patience(runs: Sequence[Table]) -> str:
    """A row a K."""
    rows = []
    for run in runs:
        share = statistics.fmean(stop.share for stop in stops(run))
        work = sum(row["flops"] for row in run["chains"]) / 1e12
        rows.append([*accuracies(run, DSKD, run["name"]), f"{share:.0%}", f"{work:.2f}"])
    return table(["", *columns(runs[0]), "mean share of epochs with KD", "TFLOPs of distilled stages"], rows)


def greedy(run: Table) -> str:
    """What it chose, why, and its overhead."""
    steps = "".join(f"1. {choice_text(choice)}\n" for choice in run["choices"])
    return (
        f"It chose {run['chosen']} ({plus_minus(accuracy(run, run['chosen'], DSKD))} on the test images), by the "
        f"monitor split:\n\n{steps}"
    )


# ---------------------------------------------------------------- costs and goals


def costs(runs: Sequence[Table]) -> str:
    """A row a run."""
    return (
        "As if each run were alone: stages that it shares with others count in each. Seconds are sums over stages. The "
        "ratios of (DSKD + controls) to KD are of the distilled stages with their controls: FLOPs over those of the "
        "same stages without controls and stops, seconds over those of the same chains under plain KD in the same run, "
        "which share their stages too. The last two have the first teachers in them: all chains under DSKD, each stage "
        "and control once, over the same chains under plain KD if each trained all its models, its teacher included."
        f"\n\n{table(COST_HEADS, map(_cost, runs))}"
    )


def _cost(run: Table) -> list[str]:
    found = run["costs"]
    roles = ("students", "teachers", "controls", "first_teachers", "stopping", "sharing")
    stages = {row["key"]: row["seconds"] for row in (*run["labels"], *run["chains"])}
    return [
        run["name"], str(len(stages)), str(found["stages_shared"]), str(found["stages_stopped"]),
        *(f"{found[role]['flops'] / 1e12:.2f}" for role in roles), f"{sum(stages.values()) / 60:.1f}",
        _ratio(found["overhead"]), _ratio(found["clock"]),
        *(_ratio(_against_alone(found, of)) for of in ("flops", "seconds")),
    ]  # fmt: skip


def _against_alone(found: Table, of: str) -> float | None:
    """What chains under DSKD with sharing cost over what plain KD does chain by chain."""
    alone = found["plain_alone"][of]
    return found["guided"][of] / alone if alone else None


def goals(content: Table) -> str:
    """What the search and the stop were to cost, against what they did."""
    rows = [(goal, figure, "met" if met else "missed") for goal, figure, met in _goals(content)]
    return table(("goal", "measured", ""), rows) if rows else ""


def _goals(content: Table) -> Iterator[tuple[str, str, bool]]:
    main, found = unit(content, "main"), unit(content, "greedy")
    if main is not None:
        once, alone = _counts(main)
        own = main["trained"]
        text = f"{once} stages a seed, not {alone}; {own['starts']} starts of {own['stages']} stages in its journal"
        least = 2 ** (len(main["protocol"]["models"]) - 1)
        yield "An exhaustive search trains a shared prefix once", text, once == least
        most = max(Counter((row["model"], row["seed"]) for row in main["labels"]).values(), default=0)
        yield "At most one run on labels for a model and a seed", f"{most}", most <= 1
        yield from _in_time(main)
        yield from _clocks(main["costs"])
    if found is not None:
        overhead = found["costs"]["overhead"]
        text = f"FLOPs of greedy search with DSKD at most {MOST_OVERHEAD} times those without controls and stops"
        yield text, _ratio(overhead), overhead is not None and overhead <= MOST_OVERHEAD


def _clocks(found: Table) -> Iterator[tuple[str, str, bool]]:
    """Both readings of what plain KD of the same chains costs: its chains share their stages too, or each is alone."""
    clock, alone = found["clock"], _against_alone(found, "seconds")
    text = "Seconds of DSKD with sharing under those of plain KD of the same chains, same run: "
    yield f"{text}plain chains share their stages too", _ratio(clock), clock is not None and clock < 1
    yield f"{text}each plain chain trains all its models", _ratio(alone), alone is not None and alone < 1


def _in_time(run: Table) -> Iterator[tuple[str, str, bool]]:
    """The goal is one of MNIST, at this many epochs and seeds."""
    about = run["protocol"]
    seeds, epochs, minutes = len(about["seeds"]), about["train"]["epochs"], run["wall_seconds"] / 60
    if (about["data"]["name"], seeds, epochs) == ("mnist", 3, 30):
        text = f"{minutes:.1f} minutes, {run['jobs']} stages at once"
        yield f"All chains, KD and DSKD, 3 seeds, in {MOST_MINUTES} minutes", text, minutes <= MOST_MINUTES


def _counts(run: Table) -> tuple[int, int]:
    """Stages that one seed's DSKD chains take, the first teacher's included: shared, and each chain for itself."""
    first = min(run["protocol"]["seeds"])
    own = {row["key"] for row in run["chains"] if (row["seed"], row["variant"]) == (first, DSKD)}
    separator = " > " if " > " in columns(run)[0] else "-"
    return len(own) + 1, sum(len(chain.split(separator)) for chain in columns(run))
