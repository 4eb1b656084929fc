"""The registrar that a plugin speaks to, and the catalog that finds what was registered."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .errors import KdError, PluginError, RecipeError, suggest
from .options import Options, validate
from .origin import Origin, blame

Target: TypeAlias = Any
"""The object itself, or ``"package.module:Name"``, imported at first use."""

KINDS = (
    "loss", "model", "dataset", "source", "transform", "strategy", "controller", "step", "adapter", "schedule",
    "optimizer", "metric", "executor", "failure_policy", "label_map", "exporter", "command",
)  # fmt: skip
REQUIRED = {
    "loss": ("needs", "build"),
    "controller": ("needs", "decide", "state_dict", "load_state_dict"),
    "strategy": ("plan",),
    "executor": ("execute", "close"),
    "failure_policy": ("decide",),
    "exporter": ("suffix", "export", "load"),
}
MOST_LISTED = 20
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_TARGET = re.compile(r"[\w.]+:[\w.]+")


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
        """The object; imported now if it was registered as text."""
        with blame(self.origin, f"loading {self.kind} {self.full_name!r}"):
            found = _resolve(self.target)
        missing = [name for name in REQUIRED.get(self.kind, ()) if not hasattr(found, name)]
        if missing:
            what = f"{self.kind} {self.full_name!r} has no {' and no '.join(map(repr, missing))}"
            raise PluginError(what, where=f"plugin {self.origin}", fix=f"See kdcore.{_class(self.kind)}.")
        return found

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

    def expect(self, value: Any, wanted: Any, what: str) -> None:
        """Refuses a value that it gave if that is no ``wanted``: in words, ``what``.

        Raises:
            PluginError: names the plugin and what was given.
        """
        if not isinstance(value, wanted):
            given = "nothing" if value is None else f"a {type(value).__name__}"
            thing = f"{_noun(self.kind)} {self.full_name!r}"
            raise PluginError(f"{thing} gave {given}", where=f"plugin {self.origin}", fix=f"It must give {what}.")

    def check(self, options: Mapping[str, Any], where: str, also: Iterable[str] = ()) -> dict[str, Any]:
        """Validated options with their defaults, as JSON. ``also`` are further keys that a typo may have meant."""
        model = self.options_class()
        with blame(self.origin, f"checking the options of {self.kind} {self.full_name!r}"):
            return validate(model, options, where, also).model_dump(mode="json")


def _resolve(target: Target) -> Any:
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    with redirect_stdout(sys.stderr):  # what a plugin prints is no part of a command's output
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
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PluginError(f"{name!r} is no name for {_a(kind)}", fix="Use a-z, 0-9, -, _ and a dot.")
        for text in (target, options):
            if isinstance(text, str) and not _TARGET.fullmatch(text):
                fix = 'Write "package.module:Name", or give the object itself.'
                raise PluginError(f"{text!r} says nothing to import for {kind} {name!r}", fix=fix)
        if any(e.kind == kind and e.name == name for e in self.entries):
            raise PluginError(f"{kind} {name!r} is registered twice", fix="Leave one out or rename it.")
        self.entries.append(Entry(kind, name, self.origin, target, options, about))

    def loss(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """A class with ``needs`` and a class method ``build(shapes, options) -> nn.Module``: see
        :class:`kdcore.Loss`.
        """
        self._add("loss", name, target, options, about)

    def model(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(options, data: DataInfo) -> nn.Module`` from images to logits; ``module.taps`` names features."""
        self._add("model", name, target, options, about)

    def dataset(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(options) -> kdcore.data.Dataset``."""
        self._add("dataset", name, target, options, about)

    def source(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Where batches come from: ``build(options, context) -> Source``; see kdcore.data.source. An attribute
        ``fingerprint(options)`` says what the content of its own files is, for the key.
        """
        self._add("source", name, target, options, about)

    def transform(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Augmentation on the device: a class constructed with its options, called with ``(batch, random)``, that
        returns a batch. ``knobs``, if it has them, join ``data.NAME``. One with a class method ``build(options,
        context)`` is built by it and told of the data: see :class:`kdcore.TransformContext`.
        """
        self._add("transform", name, target, options, about)

    def strategy(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """A class with ``plan(run, options)``: see :class:`kdcore.Strategy`."""
        self._add("strategy", name, target, options, about)

    def controller(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """A class constructed with its options: see :class:`kdcore.Controller`. An optional static method
        ``prepare(stage, run, options) -> Stage`` adds what it needs to a distilled stage.
        """
        self._add("controller", name, target, options, about)

    def step(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Forward, losses and updates of one batch: a class constructed with its options, called with
        ``(ctx: StepContext, batch: Batch)``. With ``state_dict`` and ``load_state_dict`` it keeps state over a resume;
        with ``splits = True`` its batches may be cut where memory is short (``StepContext.pieces``).
        """
        self._add("step", name, target, options, about)

    def adapter(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(student_shape, teacher_shape, options) -> nn.Module`` from a student's feature to a teacher's.

        Shapes are without the batch; a map may come out smaller than the teacher's, which is then pooled to its size.
        A loss whose options have ``adapts = True`` and a key ``adapter``, the name, builds it by ``Shapes.adapter``.
        """
        self._add("adapter", name, target, options, about)

    def schedule(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``schedule(epoch: float, length: int, options) -> float``: a factor of a weight or a learning rate."""
        self._add("schedule", name, target, options, about)

    def optimizer(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(parameters, lr, options) -> torch.optim.Optimizer``."""
        self._add("optimizer", name, target, options, about)

    def metric(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``metric(student_logits, teacher_logits, target) -> Tensor [B]`` on the monitor split, if a controller's
        ``needs`` names it.
        """
        self._add("metric", name, target, options, about)

    def executor(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """Runs jobs: see :class:`kdcore.executor.Executor`."""
        self._add("executor", name, target, options, about)

    def failure_policy(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """What to do when a stage runs out of memory: a class constructed with its options, see
        :class:`kdcore.FailurePolicy`; ``execute.failure`` names it.
        """
        self._add("failure_policy", name, target, options, about)

    def label_map(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """``build(options, data: DataInfo) -> (classes, groups)``: the number of the teacher's classes, and for each
        of the data's the tuple of the teacher's that it stands for, none of them twice. ``teacher.label_map`` names it.
        """
        self._add("label_map", name, target, options, about)

    def exporter(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """A format of ``kdcore export``: a class constructed with its options, see :class:`kdcore.Exporter`. What it
        writes is kept if it gives the same logits when it is read again.
        """
        self._add("exporter", name, target, options, about)

    def command(self, name: str, target: Target, *, options: Target = None, about: str = "") -> None:
        """A typer function that becomes ``kdcore NAME``."""
        self._add("command", name, target, options, about)


@dataclass
class Catalog:
    """All entries by kind and name. A short name works while one plugin offers it."""

    entries: dict[str, dict[str, list[Entry]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    broken: Mapping[str, str] = field(default_factory=dict)
    left_out: Iterable[str] = ()

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
        found = [e for e in self.entries[kind].get(short, []) if not plugin or e.origin.plugin == plugin]
        if len(found) == 1:
            return found[0]
        if not found:
            raise self._unknown(kind, name, where)
        choices = " or ".join(repr(e.full_name) for e in found)
        what = f"{_noun(kind)} {name!r} is ambiguous: {len(found)} plugins offer it"
        raise RecipeError(what, where=where, fix=f"Write {choices}.")

    def adapter_of(self, options: Options, where: str = "") -> Entry | None:
        """The adapter that a loss's options name, if their class says that its key ``adapter`` names one."""
        name = getattr(options, "adapter", "") if getattr(options, "adapts", False) else ""
        return self.find("adapter", name, where) if name else None

    def _unknown(self, kind: str, name: str, where: str) -> KdError:
        """A misspelt name is the recipe's fault; where nothing is similar, a broken plugin is the likelier one."""
        plugin, _, short = name.rpartition("/")
        if plugin in self.broken:
            fix = f"Repair or update it; `kdcore plugins` shows the same, -p no:{plugin} leaves it out."
            return PluginError(f"{name!r} needs a broken plugin: {self.broken[plugin]}", where=where, fix=fix)
        fix = self._meant(kind, name, short)
        what = f"unknown {_noun(kind)} {name!r}"
        if self.left_out:
            fix += f" Left out by -p: {', '.join(sorted(self.left_out))}."
        if not self.broken:
            return RecipeError(what, where=where, fix=fix)
        broken = "; ".join(self.broken.values())
        kind_of_error = RecipeError if fix.startswith("Did") else PluginError
        return kind_of_error(what, where=where, fix=f"{fix} A broken plugin may offer it: {broken}.")

    def _meant(self, kind: str, name: str, short: str) -> str:
        other = [k for k in KINDS if k != kind and short in self.entries[k]]
        if other:
            return f"{short!r} is {_a(other[0])}, not {_a(kind)}."
        known = [e.full_name if "/" in name else e.name for e in self.all(kind)]
        text = suggest(name, known)
        many = not text.startswith("Did") and len(known) > MOST_LISTED
        return f"`kdcore plugins` lists the {len(known)} known ones." if many else text


def _class(kind: str) -> str:
    return kind.title().replace("_", "")


def _a(kind: str) -> str:
    noun = _noun(kind)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _noun(kind: str) -> str:
    return "data set" if kind == "dataset" else kind.replace("_", " ")
