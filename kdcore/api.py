"""The way in from Python: what ``kdcore run`` does, for a recipe or for a person's own modules and data."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .cli.console import RunConsole
from .cli.drive import catch_signals, check, folder_of, open_run
from .cli.host import load_host
from .errors import Interrupted, KdError, RecipeError, suggest
from .generators import kept
from .origin import OWN, Origin
from .plugins import PluginHost
from .ranks import ranks
from .recipe import Recipe
from .runresult import RunResult, result_of
from .tables import DataTable, TrainTable

if TYPE_CHECKING:
    from torch import nn

    from .given import Given

Table: TypeAlias = Mapping[str, Any]
Model: TypeAlias = "nn.Module | Table | str"
WORKERS = "Worker processes cannot see what this process holds: leave jobs out, or use a recipe and a plugin file."
_TABLES: Mapping[str, Any] = {"": Recipe, "data": DataTable, "train": TrainTable}
_SAID_OTHERWISE = {"name", "data", "teacher", "student", "train", "controller", "plugins"}


def run(
    recipe: Table | str | Path,
    *,
    sets: Sequence[str] = (),
    root: str | Path = "runs",
    store: str | Path | None = None,
    jobs: int | None = None,
    plugins: Iterable[Any] = (),
    plugin_files: Iterable[str | Path] = (),
    quiet: bool = False,
    strict: bool = False,
) -> RunResult:
    """Runs a recipe as ``kdcore run`` does; the same call goes on after a kill, and takes from the store what is there.

    Args:
        recipe: the path of a TOML file, or the same as a mapping.
        sets: overrides like ``"train.epochs=5"``.
        root: where runs and the store live.
        store: the store; default: ``root/store``.
        jobs: stages at once; default: the recipe's.
        plugins: modules, classes or objects whose attributes implement hooks, for this call alone.
        plugin_files: Python files that are loaded as plugins.
        quiet: print nothing but a plugin that fails.
        strict: a preflight warning ends the run.

    Returns:
        The result, with its folder and models.

    Raises:
        KdError: what is wrong, where, and what to write.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    objects, warnings = _objects(plugins)
    files = [str(file) for file in plugin_files]
    source = recipe if isinstance(recipe, Mapping) else Path(recipe)
    name = source.stem if isinstance(source, Path) else "run"
    host = load_host((), files, objects=objects)
    with RunConsole(quiet) as console:
        return _execute(
            source, sets, host, console, name, Path(root), store, jobs=jobs, plugin_files=files, strict=strict,
            warnings=warnings,
        )  # fmt: skip


def distill(
    teacher: Model,
    student: Model,
    train: Any,
    test: Any = None,
    *,
    monitor: Any = 0.1,
    classes: int | None = None,
    label_map: Table | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    objective: Sequence[Table] | None = None,
    controllers: Sequence[Table | str] = (),
    strategy: Table | str = "distill",
    epochs: int = 30,
    lr: float = 0.05,
    optimizer: Table | str = "sgd",
    schedule: Table | str = "cosine",
    teacher_train: Table | None = None,
    batch_size: int | Literal["auto"] = 128,
    transforms: Sequence[Table | str] = (),
    seed: int = 0,
    name: str = "distill",
    root: str | Path = "runs",
    store: str | Path | None = None,
    plugins: Iterable[Any] = (),
    plugin_files: Iterable[str | Path] = (),
    quiet: bool = False,
    strict: bool = False,
    **more: Any,
) -> RunResult:
    """Distils a teacher into a student on your own data.

    The same call trains nothing the second time, and goes on after a kill: modules count by their weights, structure
    and source, data by their bytes. Your modules are copied, never changed.

    Args:
        teacher: a module, which is used as it is, unless ``teacher_train`` is given; or a model as in a recipe, which
            is trained first unless it has ``weights``: ``{"model": "resnet", "size": 20}``.
        student: a module, which starts from its own weights; or a model as in a recipe.
        train: a torch ``Dataset`` of (image, label) pairs, a pair (images, labels) of tensors or arrays, a
            :class:`kdcore.Split`; or a :class:`kdcore.Dataset`, which holds ``test`` too.
        test: likewise. Nothing is decided on it.
        monitor: the share of ``train`` that is held out for decisions, or data of its own.
        classes: their number; default: counted from the labels.
        label_map: which of the teacher's classes each of the data's stands for, where they are not the same:
            ``{"name": "subset", "of": 1000, "classes": [3, 17]}``.
        mean: per channel or for all, of images / 255 if they are uint8. Default: nothing is normalised if images are
            floating; the train split's statistics if they are uint8.
        std: likewise; given with ``mean`` or not at all.
        objective: terms as in a recipe: ``[{"loss": "cross_entropy"}, {"loss": "dkd", "weight": 8.0}]``.
        controllers: as in a recipe: ``[{"name": "dskd", "patience": 3}]``.
        strategy: as in a recipe; a module in its options is handed over like a student.
        epochs: passes over the training split.
        lr: learning rate.
        optimizer: as in a recipe.
        schedule: of the learning rate, as in a recipe.
        teacher_train: what differs where the teacher is trained on labels first, e.g. ``{"epochs": 60}``; a module is
            trained, from its own weights, only if this is given.
        batch_size: samples a step; or "auto", as many as fit on the device.
        transforms: augmentation, as in a recipe: ``["flip", {"name": "shift", "pixels": 4}]``.
        seed: of everything that is random but the monitor split.
        name: the folder is ``root/name-<hash>``.
        root: where runs and the store live.
        store: the store; default: ``root/store``.
        plugins: as in :func:`run`.
        plugin_files: as in :func:`run`.
        quiet: print nothing but a plugin that fails.
        strict: a preflight warning ends the run.
        **more: further keys of a recipe, its ``data`` and its ``train``: ``threads=1``, ``device="cuda"``,
            ``warmup_epochs=2``, ``keep="best"``, ``drop_last=True``.

    Returns:
        The result, with its folder and models.

    Raises:
        KdError: what is wrong, with which argument, and what to write.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    from .given import take_data

    tables = _placed(more)
    objects, warnings = _objects(plugins)
    files = [str(file) for file in plugin_files]
    share = {"monitor": monitor} if isinstance(monitor, int | float) else {}
    batches = {**share, "batch_size": batch_size, "transforms": transforms}
    with _arguments(), RunConsole(quiet) as console, kept():
        given = take_data(train, test, None if share else monitor, classes, mean, std, console.handle)
        recipe = {
            **tables[""],
            "seed": seed,
            "data": {**given.data_table(), **batches, **tables["data"]},
            "teacher": _teacher(given, teacher, label_map, teacher_train, console),
            "student": given.table(student, "student"),
            "train": {"epochs": epochs, "lr": lr, "optimizer": optimizer, "schedule": schedule,
                      "teacher": dict(teacher_train or {}), **tables["train"]},
            "controller": controllers,
            "strategy": given.tables(strategy, "strategy"),
        }  # fmt: skip
        recipe |= {} if objective is None else {"objective": objective}
        host = load_host((), files, objects=[(Origin(OWN), given), *objects])
        return _execute(
            recipe, (), host, console, name, Path(root), store, plugin_files=files, strict=strict,
            warnings=(*given.warnings, *warnings),
        )  # fmt: skip


def _teacher(given: Given, teacher: Model, label_map: Table | None, train: Table | None, console: RunConsole) -> Any:
    """The teacher's table; a module is used as it is, unless it is said how to train it."""
    table = given.table(teacher, "teacher", label_map is not None)
    if label_map is not None:
        table = {"model": table} if isinstance(table, str) else table
        if "label_map" in table:
            what = "the teacher's table has a label map too"
            raise RecipeError(what, where="distill(label_map=...)", fix="Give it once.")
        table = {**table, "label_map": label_map}
    if isinstance(teacher, Mapping | str) or train is not None:
        return table
    if given.dataset.mean is None:
        text = "gets images normalised by the train split; if it was trained otherwise, give mean= and std="
        console.handle({"kind": "note", "name": "teacher", "text": text})
    return {**table, "given": True}


def _placed(more: Table) -> dict[str, dict[str, Any]]:
    """Further keys of a recipe, each under the table that has it."""
    homes = {key: table for table, model in _TABLES.items() for key in model.model_fields if key not in _SAID_OTHERWISE}
    found: dict[str, dict[str, Any]] = {table: {} for table in _TABLES}
    for key, value in more.items():
        if key not in homes:
            fix = WORKERS if key == "jobs" else suggest(key, {*homes, *(distill.__kwdefaults__ or {})})
            raise RecipeError("unknown argument", where=f"distill({key}=...)", fix=fix)
        found[homes[key]][key] = value
    return found


def _objects(plugins: Iterable[Any]) -> tuple[list[tuple[Origin, Any]], tuple[str, ...]]:
    """Plugins that lie in no file, each with what tells its code from another's, and warnings."""
    from .content import hooks_of

    found, warnings = [], []
    for plugin in plugins:
        if isinstance(plugin, str | Path):
            raise RecipeError(f"{str(plugin)!r} is a path", where="plugins", fix="Give files as plugin_files=[...].")
        name = getattr(plugin, "__name__", type(plugin).__name__).rpartition(".")[2].strip("_").lower()
        content = hooks_of(plugin)
        if content.problem:
            warnings.append(f"plugin {name}: stages that use it are trained again at every call: {content.problem}")
        found.append((Origin(name, content=content.key), plugin))
    return found, tuple(warnings)


def _execute(
    source: Table | Path,
    sets: Sequence[str],
    host: PluginHost,
    console: RunConsole,
    name: str,
    root: Path,
    store: str | Path | None,
    *,
    jobs: int | None = None,
    plugin_files: Sequence[str],
    strict: bool,
    warnings: tuple[str, ...],
) -> RunResult:
    with host.blaming():
        if (size := ranks().size) > 1:
            fix = "Write a recipe: `torchrun --nproc-per-node N -m kdcore run recipe.toml`."
            raise RecipeError(f"called in {size} processes of torchrun", where="kdcore.run", fix=fix)
        recipe = check(source, sets, host)
        _check_place(recipe, host, jobs)
        root = root.resolve()
        with _stoppable() as stopped:
            opened = open_run(
                recipe, host, folder_of(recipe, name, root), console, stopped,
                store=Path(store or root / "store").resolve(), jobs=jobs, plugin_files=plugin_files, strict=strict,
                warnings=warnings,
            )  # fmt: skip
            content = opened.execute()
            result = result_of(opened, content)
    console.outcome(content, result.folder)
    return result


def _check_place(recipe: Recipe, host: PluginHost, jobs: int | None) -> None:
    """What is held by this process is used in this process."""
    held = [origin for origin in host.origins.values() if origin.content or origin.plugin == OWN]
    elsewhere = host.catalog.find("executor", recipe.execute.name).full_name != "core/local"
    if held and ((jobs or recipe.execute.jobs) > 1 or elsewhere):
        where = "execute.name" if elsewhere else "execute.jobs"
        raise RecipeError(f"plugin {held[0].plugin!r} was handed over in Python", where=where, fix=WORKERS)


# ---------------------------------------------------------------- the caller's process


@contextmanager
def _arguments() -> Iterator[None]:
    """An error names the argument, not the place in a recipe that nobody wrote."""
    try:
        yield
    except KdError as error:
        error.where = re.sub(r"^train\.teacher\b", "teacher_train", error.where)
        error.where = re.sub(r"^(?:data|train)\.(\w+)", r"distill(\1=...)", error.where)
        raise


@contextmanager
def _stoppable() -> Iterator[Callable[[], int]]:
    """A flag that Ctrl-C and SIGTERM raise, in the main thread; the caller's handlers come back at the end.

    The first signal ends the run with a checkpoint, and then does what it would have done; a second does so at once.
    """
    main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    before = {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def again(number: int) -> None:
        restore()
        signal.raise_signal(number)

    try:
        yield catch_signals(before, again)
    except Interrupted as error:
        restore()
        if error.signal_number == signal.SIGINT:
            raise KeyboardInterrupt("stopped after a checkpoint; the same call goes on from there") from error
        signal.raise_signal(error.signal_number)
        raise
    finally:
        restore()
