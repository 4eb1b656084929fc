"""The runs behind the table of DSKD: what each part trains, how long it will take, and training it within a budget.

All runs share one store, so a stage that several parts need is trained once; a run that is finished is not begun again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import ending

import kdcore
from kdcore.cli.console import RunConsole
from kdcore.cli.drive import check, folder_of, open_run, planned
from kdcore.keys import in_order
from kdcore.overrides import read
from kdcore.plan import Stage
from kdcore.plugins import PluginHost, load_plugins
from kdcore.progress import is_finished
from kdcore.store import Store
from kdcore.strategy import start

Table = Mapping[str, Any]

LONG_EPOCHS = 200
PATIENCES = (1, 3, 5, 10)
STRONG: dict[str, tuple[str, ...]] = {
    "mnist": ('teacher={model = "mlp", size = 3, width = 256}', "train.teacher.lr=0.05"),
}


@dataclass(frozen=True)
class Bench:
    """What is run, and where.

    Args:
        data: name of the data set.
        recipe: its recipe; strategy ``search``, exhaustive, with ``baseline``.
        runs: folder of the runs and of their store.
        root: of the data set's files, where it has some.
        seeds: of every chain.
        epochs: instead of the recipe's; long runs change in proportion.
        jobs: stages at once.
        strong: overrides that bring a stronger teacher; none: there is no such part.
    """

    data: str
    recipe: Path
    runs: Path
    root: Path | None = None
    seeds: int = 3
    epochs: int | None = None
    jobs: int = 2
    strong: tuple[str, ...] = ()

    @property
    def table(self) -> dict[str, Any]:
        return read(self.recipe)


@dataclass(frozen=True)
class Unit:
    """One run: its part, its name within it, and what it changes in the recipe."""

    part: str
    name: str
    changes: tuple[str, ...] = ()
    epochs: int | None = None

    def sets(self, bench: Bench) -> list[str]:
        """All overrides; the last one of a key counts."""
        epochs = [f"train.epochs={self.epochs}"] if self.epochs else []
        root = [f"data.root={bench.root.resolve()}"] if bench.root else []
        return [f"strategy.seeds={bench.seeds}", *epochs, *root, *self.changes]


def units(bench: Bench, part: str) -> list[Unit]:
    """The runs of a part."""
    return [
        Unit(part, name, changes, long_epochs(bench) if part == "long" else bench.epochs)
        for name, changes in PARTS[part](bench)
    ]


def long_epochs(bench: Bench) -> int:
    """200, or as much more than ``bench.epochs`` as 200 is more than the recipe's."""
    usual = int(bench.table["train"]["epochs"])
    return LONG_EPOCHS if bench.epochs is None else round(LONG_EPOCHS * bench.epochs / usual)


def _main(bench: Bench) -> list[tuple[str, tuple[str, ...]]]:
    return [("main", ())]


def _alpha(bench: Bench) -> list[tuple[str, tuple[str, ...]]]:
    return [("alpha", ("objective.0.weight=0.9", "objective.1.weight=0.1"))]


def _k(bench: Bench) -> list[tuple[str, tuple[str, ...]]]:
    return [(f"K = {k}", (f"controller.0.patience={k}", "strategy.baseline=false")) for k in PATIENCES]


def _strong(bench: Bench) -> list[tuple[str, tuple[str, ...]]]:
    return [("strong", bench.strong)] if bench.strong else []


def _long(bench: Bench) -> list[tuple[str, tuple[str, ...]]]:
    """The chains that collapse in the paper are among those of the largest and the smallest candidate."""
    first, *_, last = bench.table["strategy"]["candidates"]
    return [("long", (f"strategy.candidates=[{inline(first)}, {inline(last)}]",))]


def _greedy(bench: Bench) -> list[tuple[str, tuple[str, ...]]]:
    return [("greedy", ("strategy.mode=greedy", "strategy.baseline=false"))]


PARTS: dict[str, Callable[[Bench], list[tuple[str, tuple[str, ...]]]]] = {
    "main": _main,
    "alpha": _alpha,
    "k": _k,
    "strong": _strong,
    "long": _long,
    "greedy": _greedy,
}


def inline(table: Table) -> str:
    """A table of texts and numbers as TOML writes it in one line."""
    return "{" + ", ".join(f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in table.items()) + "}"


# ---------------------------------------------------------------- execution


def folder(unit: Unit, bench: Bench, host: PluginHost) -> Path:
    """Where the run of a unit lies, or will lie."""
    return folder_of(check(bench.recipe, unit.sets(bench), host), bench.recipe.stem, bench.runs.resolve())


def execute(unit: Unit, bench: Bench, deadline: float | None) -> Path | None:
    """Brings a run to its end; its folder, or None if the deadline came first (the next call goes on from there).

    Args:
        unit: the run.
        bench: where, and how many stages at once.
        deadline: of ``time.monotonic()``; None for none.
    """
    found = folder(unit, bench, load_plugins())
    if is_finished(found):
        return found
    if deadline is not None and time.monotonic() >= deadline:
        return None
    try:
        with ending(deadline):
            kdcore.run(bench.recipe, sets=unit.sets(bench), root=bench.runs, jobs=bench.jobs)
    except KeyboardInterrupt:
        if deadline is None or time.monotonic() < deadline:
            raise
        return None
    return found


# ---------------------------------------------------------------- plan


@dataclass(frozen=True)
class Forecast:
    """What a unit will train that no unit before it has trained.

    Args:
        unit: the run.
        stages: all that it needs.
        missing: those that are not stored.
        seconds: of the missing ones at ``jobs`` at once, by the seconds an epoch that stored stages took; None if there
            are none.
    """

    unit: Unit
    stages: int
    missing: int
    seconds: float | None


def forecast(bench: Bench, wanted: Sequence[Unit]) -> list[Forecast]:
    """Plans every unit under the assumption that all results are equal and nothing stops."""
    host, rates, found = load_plugins(), _rates(Store(bench.runs / "store")), []
    known = set(rates.keys)
    for unit in wanted:
        stages = _stages(unit, bench, host)
        missing = {key: stage for key, stage in stages.items() if key not in known}
        known |= missing.keys()
        seconds = [rates.of(stage) * stage.length for stage in missing.values()] if rates.by_name else None
        found.append(Forecast(unit, len(stages), len(missing), None if seconds is None else sum(seconds) / bench.jobs))
    return found


def _stages(unit: Unit, bench: Bench, host: PluginHost) -> dict[str, Stage]:
    recipe = check(bench.recipe, unit.sets(bench), host)
    with RunConsole(quiet=True) as console:
        run = open_run(recipe, host, bench.runs / "plan", console, lambda: 0, store=bench.runs / "store")
    asked = in_order(planned(start(run.strategy, run.view, host), run.strategy, run.view.estimate), run.keys)
    return {run.keys.of(stage): stage for stage in asked}


@dataclass(frozen=True)
class _Rates:
    """Seconds an epoch of stored stages, by name, and the keys of these stages."""

    by_name: Mapping[str, list[float]]
    keys: frozenset[str]

    def of(self, stage: Stage) -> float:
        every = [rate for rates in self.by_name.values() for rate in rates]
        return statistics.mean(self.by_name.get(stage.name, every))


def _rates(store: Store) -> _Rates:
    by_name: dict[str, list[float]] = {}
    keys = store.stored()
    for result in filter(None, map(store.result, keys)):
        by_name.setdefault(result["name"], []).append(result["seconds"] / max(result["ticks"], 1))
    return _Rates(by_name, frozenset(keys))
