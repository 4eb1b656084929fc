"""What ``run``, ``resume``, ``plan`` and ``store`` do."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..autosize import expected
from ..codec import digest
from ..errors import PlanError, RecipeError
from ..journal import Journal
from ..keys import Keys, in_order
from ..machine import make_context, make_settings
from ..measure import Measure
from ..named import Names
from ..options import Field, Plain
from ..plan import Choice, MemberResult, Plan, Result, Schedule, Spec, Stage
from ..plugins import PluginHost
from ..ranks import follow, leading, ranks
from ..recipe import Recipe, compile_recipe, load
from ..report.formats import counted, flops
from ..runner import Run
from ..runview import RunView, UnmeasuredError
from ..store import Store
from ..stored import check_stored
from ..strategy import check_outcome, check_stages, start
from .console import RunConsole

if TYPE_CHECKING:
    from ..training.world import World

LONGEST_PLAN = 10_000


class Saved(Plain):
    """What ``resume`` reads of run.json."""

    recipe: dict[str, Any]
    store: Path
    plugin_files: list[str]
    blocked: list[str]
    threads: int = Field(ge=1)
    jobs: int = Field(ge=1)
    world_size: int = Field(1, ge=1)
    cwd: Path
    plugins: tuple[tuple[str, ...], ...] = ()


def drive(
    source: Path | Mapping[str, Any],
    sets: list[str],
    host: PluginHost,
    jobs: int | None,
    root: Path,
    store: Path | None,
    plugin_files: list[str],
    blocked: list[str],
    strict: bool,
    allow_plugin_change: bool,
    folder: Path | None = None,
    threads: int | None = None,
    show: Callable[[], RunConsole] = RunConsole,
) -> None:
    """Runs a recipe to its report, shown by the console that ``show`` makes, and prints the table."""
    own = ranks()
    if own.rank:
        follow(host, own, catch_signals)
    recipe = check(source, sets, host)
    folder = folder or folder_of(recipe, source.stem if isinstance(source, Path) else "run", root)
    with leading(own) as world, show() as console:
        run = open_run(
            recipe, host, folder, console, catch_signals(), store=store or root / "store", jobs=jobs,
            plugin_files=plugin_files, blocked=blocked, strict=strict, threads=threads,
            allow_plugin_change=allow_plugin_change, world=world,
        )  # fmt: skip
        result = run.execute()
    console.outcome(result, folder)


def open_run(
    recipe: Recipe,
    host: PluginHost,
    folder: Path,
    console: RunConsole,
    stopped: Callable[[], int],
    *,
    store: Path,
    jobs: int | None = None,
    plugin_files: Iterable[str | Path] = (),
    blocked: Iterable[str] = (),
    strict: bool = False,
    threads: int | None = None,
    allow_plugin_change: bool = False,
    warnings: tuple[str, ...] = (),
    world: World | None = None,
) -> Run:
    """A run of a checked recipe, ready to execute; plugin files become absolute, for workers and a resume."""
    jobs = jobs or recipe.execute.jobs
    if world is not None:
        _check_ranks(recipe, host, jobs)
    files = tuple(str(Path(file).resolve()) for file in plugin_files)
    settings = make_settings(
        recipe, store, jobs, threads=threads, strict=strict, plugin_files=files, blocked=tuple(blocked)
    )
    context = make_context(host, stopped, world)
    return Run(recipe, host, settings, folder, console, jobs, context, allow_plugin_change, warnings)


def _check_ranks(recipe: Recipe, host: PluginHost, jobs: int) -> None:
    """Ranks train one stage at a time, in these processes."""
    if jobs > 1:
        what = f"{jobs} stages at once, and every stage in all ranks"
        raise RecipeError(what, where="execute.jobs", fix="Leave out --jobs, or torchrun.")
    if host.catalog.find("executor", recipe.execute.name).full_name != "core/local":
        what = f"executor {recipe.execute.name!r} trains elsewhere than torchrun's processes"
        raise RecipeError(what, where="execute.name", fix="Leave it out, or torchrun.")


def check(source: Path | Mapping[str, Any], sets: Sequence[str], host: PluginHost) -> Recipe:
    """Checks the whole recipe before torch is imported."""
    recipe = load(source, sets)
    host.require(recipe.plugins.require)
    view, strategy = compile_recipe(recipe, host.catalog)
    first = start(strategy, view, host)
    with suppress(UnmeasuredError):
        next(first, None)  # models that only the strategy knows of are named in its first stages
    first.close()
    return recipe


def folder_of(recipe: Recipe, name: str, root: Path) -> Path:
    """The folder is a function of the recipe, so that the same command finds its run again."""
    science = recipe.model_dump(mode="json", exclude={"execute"}, exclude_defaults=True)  # later keys rename no folder
    return root / f"{name}-{digest(science)[:8]}"


def catch_signals(
    numbers: Iterable[int] = (signal.SIGINT, signal.SIGTERM), again: Callable[[int], None] = lambda n: os._exit(128 + n)
) -> Callable[[], int]:
    """The first signal is remembered, so that the stage ends with a checkpoint; the second ends at once.

    Args:
        numbers: signals to catch.
        again: what the second one does.
    """
    caught: list[int] = []

    def handler(number: int, frame: object) -> None:
        if caught:
            again(number)
        caught.append(number)

    for number in numbers:
        signal.signal(number, handler)
    return lambda: caught[0] if caught else 0


# ---------------------------------------------------------------- plan


def show_plan(source: Path, sets: list[str], host: PluginHost, root: Path, store: Path | None) -> None:
    """Prints what a run would train, under the assumption that all results are equal; of several ranks, the first does.

    Raises:
        KdError: what the run would raise before its first stage.
    """
    if ranks().rank:
        return  # rank 0 tells
    recipe = check(source, sets, host)
    from ..training.rehearsal import rehearse  # which imports torch

    settings = make_settings(recipe, store or root / "store", recipe.execute.jobs)
    context = make_context(host)
    journal = folder_of(recipe, source.stem, root) / "journal.jsonl"
    recipe, is_bound = expected(recipe, host.catalog, settings, context.load, journal)
    keys = Keys(host.catalog, recipe.seed, settings, lambda spec: str(context.load(spec).fingerprint))
    table = Table("stage", "members", "length", "cost", "stored")
    view, strategy = compile_recipe(recipe, host.catalog)
    measure = Measure(host.catalog, context.load, view.data)
    names = Names(recipe, dataclasses.replace(view, measure=measure.model, estimate=measure.stage))
    total, trains = 0, False
    for stage in in_order(planned(start(strategy, names.noted(), host), strategy, measure.stage), keys):
        cost = measure.stage(stage)
        stored = not is_bound and Store(settings.store).result(keys.of(stage)) is not None
        total, trains = total + (0 if stored else cost), trains or not stored
        members = ", ".join(f"{name} {member.model}" for name, member in stage.members.items())
        table.add_row(stage.name, members, str(stage.length), flops(cost), "yes" if stored else "?" * is_bound)
    if trains:
        rehearse(names, host.catalog, context.load(view.data), Store(settings.store), settings)
    console = Console()
    console.print(table)
    console.print(_batches(view) + " (at most: settled when the run begins)" * is_bound)
    console.print(f"to train: {flops(total)} (convolutions and matrix products; no stop is assumed)")


def _batches(view: RunView) -> str:
    """Batch size and learning rates, which a recipe may leave to be found."""
    specs = {"": view.optimizer, "teacher ": view.teacher_optimizer or view.optimizer}
    rates = {who: spec.lr.value if isinstance(spec.lr, Schedule) else spec.lr for who, spec in specs.items()}
    told = ", ".join(f"{who}learning rate {rate:g}" for who, rate in rates.items() if not who or rate != rates[""])
    return f"batches of {view.data.batch_size}, {told}"


def planned(plan: Plan, strategy: Spec, cost: Callable[[Stage], int]) -> list[Stage]:
    """The stages that a strategy asks for if all results are equal; ``cost`` gives the FLOPs of one."""
    answer: Any = None
    stages: list[Stage] = []
    while len(stages) < LONGEST_PLAN:
        try:
            wanted = plan.send(answer)
        except StopIteration as end:
            check_outcome(end.value, strategy)
            return stages
        if isinstance(wanted, Choice):
            answer = None
            continue
        asked = check_stages(wanted, strategy)
        stages += asked
        flat = [_flat(stage, cost(stage)) for stage in asked]
        answer = flat if isinstance(wanted, list) else flat[0]
    raise PlanError(f"more than {LONGEST_PLAN:,} stages", where=f"strategy {strategy.name!r}")


def _flat(stage: Stage, flops: int) -> Result:
    """A result that says that every member is equally good, and that the stage cost what it may at most."""
    members = {name: MemberResult(stage[name], 0.5, 0.5, (), 0, 0) for name in stage.members}
    return Result(stage, "", members, (), 0.0, flops)


# ---------------------------------------------------------------- store


def list_store(path: Path) -> None:
    """Prints every stored result."""
    store = Store(path, print)
    table = Table("key", "stage", "members", "steps", "seconds")
    for key in store.stored():
        found = store.result(key)
        if found is not None:
            result = check_stored(found, key)
            members = ", ".join(f"{name} {member['model']}" for name, member in result["members"].items())
            table.add_row(key[:12], result["name"], members, str(result["steps"]), f"{result['seconds']:.1f}")
    Console().print(table)


def collect(root: Path, path: Path, dry: bool) -> None:
    """Removes what no journal names: of a run under ``root``, or of any other that uses the store."""
    store, keep = Store(path), set[str]()
    folders = {journal.parent.resolve() for journal in root.glob("*/journal.jsonl")} | set(store.runs())
    for folder in sorted(folders):
        keep |= Journal(folder / "journal.jsonl").keys()
    removed = store.collect(keep, dry)
    for folder in removed:
        print(folder)
    print(f"{counted(len(removed), 'folder')} {'would be ' if dry else ''}removed")
