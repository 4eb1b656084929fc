"""The registrar that a plugin speaks to, and the catalog that finds what was registered."""

from __future__ import annotations

import hashlib
import importlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from .errors import KdError, PluginError, RecipeError, suggest
from .options import Options, validate

Target: TypeAlias = Any
"""The object itself, or ``"package.module:Name"``, imported at first use."""

KINDS = (
    "loss", "model", "dataset", "source", "transform", "strategy", "controller", "step", "adapter", "schedule",
    "optimizer", "metric", "executor", "failure_policy", "label_map", "exporter", "command",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where a registered thing comes from. ``files`` is the plugin's source: a module file or a package folder."""

    plugin: str
    distribution: str = ""
    version: str = ""
    files: Path | None = None

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version})" if self.distribution else self.plugin

    @cached_property
    def code(self) -> dict[str, str]:
        """Identity of the plugin's code: distribution version and sha256 of its source files."""
        return {"plugin": self.plugin, "version": self.version, "source": _digest_files(self.files)}


def _digest_files(root: Path | None) -> str:
    if root is None:
        return ""
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    total = hashlib.sha256()
    for file in files:
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        total.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


@contextmanager
def blame(origin: Origin, doing: str) -> Iterator[None]:
    """Notes on any exception that leaves the block which plugin it came from; its type is kept."""
    try:
        yield
    except Exception as error:
        note = f"in plugin {origin}, {doing}"
        if not isinstance(error, KdError) and note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def blame_by_traceback(error: BaseException, origins: Iterable[Origin]) -> None:
    """Notes which plugin's code raised ``error``: the deepest frame that lies in a plugin's files."""
    if is_blamed(error):
        return
    frames = [(Path(f.filename).resolve(), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    owners = [origin for origin in origins if origin.files is not None]
    for file, line in reversed(frames):
        for origin in owners:
            if file == origin.files or origin.files in file.parents:
                error.add_note(f"in plugin {origin}, {file.name} line {line}")
                return


def is_blamed(error: BaseException) -> bool:
    """True if a plugin was named as the place where ``error`` arose."""
    return any(note.startswith("in plugin ") for note in getattr(error, "__notes__", ()))


@dataclass(frozen=True)
class Entry:
    """One registered thing."""

    kind: str
    name: str
    origin: Origin
    target: Target
    options: Target = None
    about: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.origin.plugin}/{self.name}"

    def load(self) -> Any:
        """The object, imported now if it was registered as text."""
        with blame(self.origin, f"loading {self.kind} {self.full_name!r}"):
            return _resolve(self.target)

    def options_class(self) -> type[Options]:
        """Its options: given at registration, else the attribute ``Options`` of the object, else none at all."""
        if self.options is None:
            found = getattr(self.load(), "Options", Options)
        else:
            with blame(self.origin, f"loading the options of {self.kind} {self.full_name!r}"):
                found = _resolve(self.options)
        if not (isinstance(found, type) and issubclass(found, Options)):
            raise PluginError(
                f"options of {self.kind} {self.full_name!r} are {found!r}",
                where=f"plugin {self.origin}",
                fix="Derive them from kdcore.Options.",
            )
        return found

    def check(self, options: Mapping[str, Any], where: str, also: Iterable[str] = ()) -> dict[str, Any]:
        """Validated options with their defaults, as JSON. ``also`` are further keys that a typo may have meant."""
        return validate(self.options_class(), options, where, also).model_dump(mode="json")


def _resolve(target: Target) -> Any:
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


class Registrar:
    """What ``kdcore_register`` gets: one method a kind, all with the same arguments.

    Args of each method:
        name: lower-case name; recipes write it, or ``plugin/name`` where it is ambiguous.
        target: the object, or ``"package.module:Name"``.
        options: an :class:`Options` class, or its text form; default: the object's attribute ``Options``. Give it as
            text to a torch-free module if the object needs torch.
        about: one line for ``kdcore plugins``.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.entries: list[Entry] = []

    def _add(self, kind: str, name: str, target: Target, options: Target, about: str) -> None:
        if not name or "/" in name or name != name.strip().lower():
            raise PluginError(f"{name!r} is not a name", where=f"{kind} of {self.origin}", fix="Use a-z, 0-9 and -.")
        if any(e.kind == kind and e.name == name for e in self.entries):
            raise PluginError(f"{kind} {name!r} is registered twice", where=f"plugin {self.origin}")
        self.entries.append(Entry(kind, name, self.origin, target, options, about))

    def loss(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(shapes, options) -> nn.Module`` with ``needs``; see kdcore.training.objective."""
        self._add("loss", name, target, options, about)

    def model(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(options, data: DataInfo) -> nn.Module`` from images to logits; ``module.taps`` names features."""
        self._add("model", name, target, options, about)

    def dataset(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(options) -> kdcore.data.Dataset``."""
        self._add("dataset", name, target, options, about)

    def source(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Where batches come from: ``build(options, context) -> Source``; see kdcore.data.source."""
        self._add("source", name, target, options, about)

    def transform(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Augmentation on the device: ``transform(images, random, options) -> images``."""
        self._add("transform", name, target, options, about)

    def strategy(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """A class with ``plan(run, options)``: see :class:`kdcore.Strategy`."""
        self._add("strategy", name, target, options, about)

    def controller(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """A class constructed with its options: see :class:`kdcore.Controller`. An optional static method
        ``prepare(stage, run, options) -> Stage`` adds what it needs to a distilled stage."""
        self._add("controller", name, target, options, about)

    def step(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``step(ctx: StepContext, batch: Batch) -> None``: forward, losses and updates of one batch."""
        self._add("step", name, target, options, about)

    def adapter(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(student_shape, teacher_shape, options) -> nn.Module`` between two feature taps."""
        self._add("adapter", name, target, options, about)

    def schedule(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``schedule(epoch: float, length: int, options) -> float``: a factor of a weight or a learning rate."""
        self._add("schedule", name, target, options, about)

    def optimizer(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(parameters, lr, options) -> torch.optim.Optimizer``."""
        self._add("optimizer", name, target, options, about)

    def metric(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``metric(student_logits, teacher_logits, target) -> Tensor [B]`` on the monitor split, if a controller's
        ``needs`` names it."""
        self._add("metric", name, target, options, about)

    def executor(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Runs jobs: see :class:`kdcore.executor.Executor`."""
        self._add("executor", name, target, options, about)

    def failure_policy(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """What to do when a stage fails. Listed; no recipe key names it yet."""
        self._add("failure_policy", name, target, options, about)

    def label_map(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Maps a teacher's classes to a student's. Listed; no recipe key names it yet."""
        self._add("label_map", name, target, options, about)

    def exporter(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Writes a finished student in another format. Listed; no command uses it yet."""
        self._add("exporter", name, target, options, about)

    def command(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """A typer function that becomes ``kdcore NAME``."""
        self._add("command", name, target, options, about)


@dataclass
class Catalog:
    """All entries by kind and name. A short name works while one plugin offers it."""

    entries: dict[str, dict[str, list[Entry]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    broken: Mapping[str, str] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        self.entries[entry.kind].setdefault(entry.name, []).append(entry)

    def all(self, kind: str) -> list[Entry]:
        return [entry for _, group in sorted(self.entries[kind].items()) for entry in group]

    def find(self, kind: str, name: str, where: str = "") -> Entry:
        """The entry that ``name`` means.

        Raises:
            RecipeError: nothing or more than one thing has that name; says what to write.
            PluginError: the name belongs to a plugin that is broken; says why.
        """
        plugin, _, short = name.rpartition("/")
        if plugin in self.broken:
            raise PluginError(f"plugin {plugin!r} is broken: {self.broken[plugin]}", where=where or f"{kind} {name!r}")
        found = [e for e in self.entries[kind].get(short, []) if not plugin or e.origin.plugin == plugin]
        if len(found) == 1:
            return found[0]
        what = kind.replace("_", " ")
        if found:
            choices = " or ".join(repr(e.full_name) for e in found)
            raise RecipeError(f"{what} {name!r} is ambiguous", where=where, fix=f"Write {choices}.")
        known = [e.full_name if plugin else e.name for e in self.all(kind)]
        fix = suggest(name, known)
        if self.broken:
            fix += " Broken plugins may offer it: " + "; ".join(f"{n}: {why}" for n, why in self.broken.items())
        raise RecipeError(f"unknown {what} {name!r}", where=where, fix=fix)


Register: TypeAlias = Callable[[Registrar], None]
