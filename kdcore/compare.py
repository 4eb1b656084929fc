"""Finished runs side by side: paired differences over seeds, from what their result.json say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, ValidationError

from .codec import canonical
from .errors import RecipeError, StorageError
from .options import Field, Plain
from .plan import Json

CONFIDENCE = 0.95
NO_VARIANT = {"seed", "execute", "data.root"}
"""Keys of a recipe that make no variant: what is repeated, where it runs, and where that machine has its data."""
PROTOCOL = ("train_images", "monitor_images", "test_images", "split_seed", "selection")
"""With data.name and the data's fingerprint, what makes numbers comparable: the same images, split and selection."""


class Row(Plain):
    """A student of one seed, by the run's own selection rule."""

    model_config = ConfigDict(protected_namespaces=())

    test_accuracy: float
    monitor_accuracy: float
    stage: str
    member: str
    seed: int | None = None


class Trained(Plain):
    """A stage of a run."""

    key: str
    seconds: float
    flops: dict[str, int]
    inputs: dict[str, dict[str, str]] = Field({})
    uses: dict[str, dict[str, str]] = Field({})


class Ran(Plain):
    """Which run it was."""

    seed: int


class Finding(Plain):
    """What is read of a run's result.json."""

    run: Ran
    protocol: dict[str, Json]
    student: Row
    replicates: dict[str, Annotated[tuple[Row, ...], Field(min_length=1)]] = Field({})
    stages: tuple[Trained, ...]
    recipe: dict[str, Json]

    def students(self) -> tuple[Row, ...]:
        """The chosen student, once a seed."""
        return next(iter(self.replicates.values()), ()) or (self.student,)


@dataclass(frozen=True)
class Sample:
    """Accuracies of one seed, as shares of the test and the monitor split."""

    seed: int
    test: float
    monitor: float
    key: str


@dataclass(frozen=True)
class Variant:
    """What was done, under one or more seeds.

    Args:
        chain: name of the replicates within a run; empty for the student that a run delivers.
        runs: where it was done.
        settings: its values of the recipe's keys that differ between variants; None where it does not set one.
        samples: in ascending order of seeds.
        flops: of training: all stages of a run, mean over runs; with ``chain`` those that it needs, mean over seeds.
        seconds: likewise.
    """

    chain: str
    runs: tuple[str, ...]
    settings: Mapping[str, Json]
    samples: tuple[Sample, ...]
    flops: float
    seconds: float


@dataclass(frozen=True)
class Gap:
    """How much more accurate one variant is than another on the test split: shares, paired by seed.

    Args:
        seeds: of the pairs.
        mean: of the differences; None without a pair.
        low: end of the 95 % interval of Student's t over seeds; None with less than two pairs.
        high: the other end.
        unpaired: seeds of this variant that the other lacks.
        missing: seeds of the other that this one lacks.
    """

    seeds: tuple[int, ...]
    mean: float | None
    low: float | None
    high: float | None
    unpaired: tuple[int, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Variants, each one's gap to the first, and where their protocols differ: key -> run -> value."""

    variants: tuple[Variant, ...]
    gaps: tuple[Gap, ...]
    mixed: Mapping[str, Mapping[str, Json]]


def check_finding(result: Mapping[str, Any], where: str) -> Finding:
    """What is read of the content of a result.json.

    Raises:
        StorageError: it is none, or its student has no accuracy.
    """
    try:
        return Finding.model_validate(dict(result))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        fix = "kdcore resume the run: it writes it again."
        raise StorageError(f"no result to compare: {place}: {first['msg']}", where=where, fix=fix) from None


def compare(findings: Mapping[str, Finding], chains: bool = False, mix: bool = False) -> Comparison:
    """Groups runs by their recipes, and compares every group with the first.

    Args:
        findings: by the name of the run.
        chains: compare the replicates within the runs, not the students that they chose.
        mix: compare although protocols differ.

    Raises:
        RecipeError: protocols differ; a seed is there twice; a run has no replicates.
    """
    mixed = protocol_differences(findings)
    if mixed and not mix:
        fix = "Compare runs of one protocol, or give --mix-protocols."
        error = RecipeError(f"the runs' protocols differ in {', '.join(mixed)}", where="kdcore compare", fix=fix)
        for key, values in mixed.items():
            error.add_note(f"{key}: {_by_value(values)}")
        raise error
    variants = _variants(findings, chains)
    return Comparison(variants, tuple(gap(variant.samples, variants[0].samples) for variant in variants), mixed)


def gap(ours: Sequence[Sample], theirs: Sequence[Sample]) -> Gap:
    """The difference of test accuracies, paired by seed, with the interval of Student's t."""
    own, other = ({sample.seed: sample.test for sample in samples} for samples in (ours, theirs))
    seeds = sorted(own.keys() & other.keys())
    differences = [own[seed] - other[seed] for seed in seeds]
    mean = statistics.fmean(differences) if seeds else None
    low, high = interval(differences)
    unpaired, missing = (tuple(sorted(a - b)) for a, b in ((set(own), set(other)), (set(other), set(own))))
    return Gap(tuple(seeds), mean, low, high, unpaired, missing)


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The ends of the mean's 95 % interval by Student's t; None with less than two values."""
    from scipy.special import stdtrit  # scipy.stats.t.ppf without importing all of scipy.stats

    if len(values) < 2:
        return None, None
    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    middle, half = statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half


def samples_of(rows: Sequence[Row], seed: int) -> tuple[Sample, ...]:
    """Students of one run; ``seed`` is of those that name none."""
    found = (
        Sample(seed if row.seed is None else row.seed, row.test_accuracy, row.monitor_accuracy, row.stage)
        for row in rows
    )
    return tuple(sorted(found, key=lambda sample: sample.seed))


# ---------------------------------------------------------------- protocols


def protocol_differences(findings: Mapping[str, Finding]) -> dict[str, dict[str, Json]]:
    """Key -> run -> value of what makes the runs' numbers incomparable; what a run does not record is not compared."""
    protocols = {name: _protocol(finding) for name, finding in findings.items()}
    found = {}
    for key in ("data.name", "fingerprint", *PROTOCOL):
        values = {name: protocol[key] for name, protocol in protocols.items() if protocol.get(key) is not None}
        if len({canonical(value) for value in values.values()}) > 1:
            found[key] = values
    return found


def _protocol(finding: Finding) -> dict[str, Json]:
    data = finding.recipe.get("data")
    name = data.get("name") if isinstance(data, Mapping) else None
    return {**finding.protocol, "data.name": name}


def _by_value(values: Mapping[str, Json]) -> str:
    """``360 (runs/a, runs/b) | 297 (runs/c)``."""
    runs: dict[str, list[str]] = {}
    for run, value in values.items():
        runs.setdefault(str(value)[:12], []).append(run)
    return " | ".join(f"{value} ({', '.join(names)})" for value, names in runs.items())


# ---------------------------------------------------------------- variants


def _variants(findings: Mapping[str, Finding], chains: bool) -> tuple[Variant, ...]:
    groups: dict[tuple[str, str], dict[str, Finding]] = {}
    for run, finding in findings.items():
        for chain in _chains(run, finding) if chains else [""]:
            groups.setdefault((canonical(_science(finding.recipe)), chain), {})[run] = finding
    settings = _settings([next(iter(group.values())).recipe for group in groups.values()])
    pairs = zip(groups.items(), settings, strict=True)
    return tuple(_variant(chain, group, differing) for ((_, chain), group), differing in pairs)


def _chains(run: str, finding: Finding) -> list[str]:
    if not finding.replicates:
        fix = "Leave out --chains: only a strategy like search trains some."
        raise RecipeError("the run has no chains to compare", where=run, fix=fix)
    return list(finding.replicates)


def _variant(chain: str, group: Mapping[str, Finding], settings: Mapping[str, Json]) -> Variant:
    samples: dict[int, tuple[str, Sample]] = {}
    costs = []
    for run, finding in group.items():
        rows = finding.replicates[chain] if chain else finding.students()
        for sample in samples_of(rows, finding.run.seed):
            before, same = samples.setdefault(sample.seed, (run, sample))
            if same.key != sample.key:  # of one key they are the same training
                text = f"seed {sample.seed} is also in {before}, of the same recipe"
                raise RecipeError(text, where=run, fix="Name one run a seed.")
        costs += [_cost(finding, [row.stage]) for row in rows] if chain else [_cost(finding)]
    found = tuple(sample for _, (_, sample) in sorted(samples.items()))
    flops, seconds = (statistics.fmean(values) for values in zip(*costs, strict=True))
    return Variant(chain, tuple(group), settings, found, flops, seconds)


def _cost(finding: Finding, wanted: Sequence[str] = ()) -> tuple[float, float]:
    """FLOPs and seconds of a run's stages, or of those that the wanted ones need."""
    stages = {stage.key: stage for stage in finding.stages}
    todo, needed = list(wanted) or list(stages), set[str]()
    while todo:
        key = todo.pop()
        if key in stages and key not in needed:
            needed.add(key)
            todo += [link["stage"] for link in (*stages[key].inputs.values(), *stages[key].uses.values())]
    used = [stage for key, stage in stages.items() if key in needed]
    return float(sum(sum(stage.flops.values()) for stage in used)), math.fsum(stage.seconds for stage in used)


def _science(recipe: Mapping[str, Json]) -> dict[str, Json]:
    """The keys and values of a recipe that say what is done."""
    return {key: value for key, value in _flat(recipe) if not {key, key.split(".")[0]} & NO_VARIANT}


def _settings(recipes: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """Of every recipe its values of the keys that are not the same in all; a table that is empty in one recipe and not
    in another is named by its keys alone.
    """
    flat = [_science(recipe) for recipe in recipes]
    keys = list(dict.fromkeys(key for found in flat for key in found))
    tables = {key.rsplit(".", n)[0] for key in keys for n in range(1, key.count(".") + 1)}
    named = [key for key in keys if key not in tables or any(found.get(key) not in (None, {}, []) for found in flat)]
    differing = [key for key in named if len({canonical(found.get(key)) for found in flat}) > 1]
    return [{key: found.get(key) for key in differing} for found in flat]


def _flat(data: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """``objective.1.temperature`` -> its value, as ``--set`` writes the path."""
    if isinstance(data, Mapping | list | tuple) and data:
        items = data.items() if isinstance(data, Mapping) else enumerate(data)
        for key, value in items:
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, data
