"""Loads plugins, keeps the broken ones apart, and calls observers."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint
from inspect import isroutine
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from . import hookspecs
from .alarm import limited, patience
from .errors import PluginError, RecipeError, suggest
from .finding import describe, installed, load_file, owner, place_of, reason, roots
from .origin import Origin, blame_by_traceback
from .registry import Catalog, Registrar

CORE = "core"


@dataclass
class PluginHost:
    """The loaded plugins: catalog of names, broken ones with the reason, muted observers."""

    manager: pluggy.PluginManager
    catalog: Catalog
    origins: dict[str, Origin] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    muted: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    strict: bool = False

    def leaves_out(self, name: str, blocked: set[str]) -> bool:
        """True if ``name`` is blocked, which is noted for errors about names that nobody knows."""
        self.left_out |= {name} & blocked
        return name in blocked

    def emit(self, hook: str, **arguments: Any) -> None:
        """Calls an observer hook of every plugin. One that raises is muted, or fatal under ``strict``."""
        for impl in [i for i in getattr(self.manager.hook, hook).get_hookimpls() if i.plugin_name not in self.muted]:
            try:
                # a copy, so that no observer changes what is stored or what the next one sees
                impl.function(*(_copy(arguments[name]) for name in impl.argnames))
            except (Exception, SystemExit) as error:
                self._mute(impl.plugin_name, hook, error)

    def _mute(self, plugin: str, hook: str, error: BaseException) -> None:
        origin = self.origins[plugin]
        message = f"{hook} raised {type(error).__name__}: {error}{place_of(error)}"
        if self.strict:
            fix = f"Leave out --strict-plugins, or the plugin: -p no:{plugin}."
            raise PluginError(message, where=f"plugin {origin}", fix=fix) from error
        self.muted[plugin] = message
        print(f"kdcore: plugin {origin}: {message}; it is muted for this run", file=sys.stderr)

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Notes on any exception that leaves the block which plugin's code raised it, if one did."""
        try:
            yield
        except Exception as error:
            blame_by_traceback(error, self.origins.values())
            raise
        except SystemExit as error:  # else a plugin could end a run half done, and with exit code 0
            ended = PluginError(f"it called sys.exit({error.code!r}){place_of(error)}", where="a plugin")
            raise ended from error

    def require(self, requirements: Iterable[str]) -> None:
        """Checks ``[plugins] require = ["name>=1.2"]``: a plugin or distribution by name, with an optional version."""
        for number, text in enumerate(requirements):
            self._require(text, f"plugins.require[{number}]")

    def _require(self, text: str, where: str) -> None:
        from packaging.requirements import InvalidRequirement, Requirement
        from packaging.utils import canonicalize_name as plain

        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            raise RecipeError(f"{text!r} is no requirement", where=where, fix='Write "name" or "name>=1.2".') from None
        name = plain(wanted.name)
        found = [o for o in self.origins.values() if name in (plain(o.plugin), plain(o.distribution))]
        if not found and wanted.name in self.broken:
            raise PluginError(f"a broken plugin: {self.broken[wanted.name]}", where=where, fix="Repair or update it.")
        if not found:
            known = [*self.origins, *(o.distribution for o in self.origins.values() if o.distribution)]
            fix = f"Install it, or give its file with --plugin-file. {suggest(wanted.name, known)}"
            raise PluginError(f"{text!r} is not installed", where=where, fix=fix)
        if not wanted.specifier.contains(found[0].version or "0", prereleases=True):
            have = found[0] if found[0].version else f"{found[0]} without a version"
            raise PluginError(f"{text!r} is required, {have} is installed", where=where, fix="Install another version.")


_LEAVES = frozenset((str, int, float, bool, type(None)))


def _copy(value: Any) -> Any:
    """A copy of plain values in a fifth of deepcopy's time, which is most of what an observer costs."""
    if type(value) in _LEAVES:
        return value
    if isinstance(value, dict):
        return {key: item if type(item) in _LEAVES else _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([item if type(item) in _LEAVES else _copy(item) for item in value])
    return value


def load_plugins(
    block: Iterable[str] = (),
    files: Iterable[str | Path] = (),
    strict: bool = False,
    objects: Iterable[tuple[Origin, Any]] = (),
) -> PluginHost:
    """Loads the core, every installed plugin, single files and objects, sorted by name.

    Args:
        block: names to leave out; the core cannot be.
        files: Python files that are loaded as plugins, named by their stem.
        strict: an observer that raises ends the run.
        objects: modules, classes or instances whose attributes implement the hooks, each with its origin.
    """
    from . import builtin

    manager = pluggy.PluginManager("kdcore")
    manager.add_hookspecs(hookspecs)
    host = PluginHost(manager, Catalog(), strict=strict)
    blocked, seconds = set(block), patience()
    register(host, Origin(CORE), builtin)
    for name, points in sorted(installed(host.broken).items()):
        if not host.leaves_out(name, blocked):
            _attempt(host, Origin(name, *_distribution(points)), partial(_load_entry_point, points), seconds)
    for file in dict.fromkeys(Path(file).resolve() for file in files):
        if not host.leaves_out(file.stem, blocked):
            _attempt(host, Origin(file.stem), partial(load_file, file), seconds, str(file))
    for origin, plugin in objects:
        _attempt(host, origin, lambda plugin=plugin: plugin, seconds)  # type: ignore[misc]
    host.catalog.broken, host.catalog.left_out = host.broken, host.left_out
    return host


def _distribution(points: list[EntryPoint]) -> tuple[str, str]:
    return owner(points[0]) if len(points) == 1 else ("", "")


def _attempt(host: PluginHost, origin: Origin, load: Callable[[], Any], seconds: float, place: str = "") -> None:
    """Loads one plugin; whatever it raises, even SystemExit, or a hang, only breaks that plugin."""
    name, module = origin.plugin, None
    try:
        with redirect_stdout(sys.stderr), limited(seconds):  # what a plugin prints is no part of a command's output
            if name in host.origins:
                raise PluginError(f"its name is taken by {host.origins[name]}", fix="Rename one of them.")
            module = load()
            register(host, origin, module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if name not in host.origins and host.manager.has_plugin(name):
            host.manager.unregister(name=name)
        key = name if name not in host.origins else f"{origin} {place}".strip()
        host.broken[key] = f"{origin}: {reason(error, place or getattr(module, '__file__', None) or '')}"


def _load_entry_point(points: list[EntryPoint]) -> ModuleType:
    if len(points) > 1:
        owners = " and ".join(sorted(" ".join(owner(point)) for point in points))
        raise PluginError(f"offered by {owners}", fix=f"Uninstall one, or -p no:{points[0].name}.")
    found = points[0].load()
    if not isinstance(found, ModuleType):
        fix = f"Name a module that implements hooks: {points[0].name} = {points[0].module!r}."
        raise PluginError(f"its entry point {points[0].value!r} names {describe(found)}", fix=fix)
    return found


def register(host: PluginHost, origin: Origin, module: Any) -> None:
    """Adds a plugin's hooks and what it registers to the host.

    Raises:
        PluginError: it breaks the contract of hooks; says how.
    """
    _check_version(module)
    _check_hooks(module)
    host.manager.register(module, origin.plugin)
    registrar = Registrar(origin)
    for impl in host.manager.hook.kdcore_register.get_hookimpls():
        if impl.plugin_name == origin.plugin:
            impl.function(*[registrar for _ in impl.argnames])
    origin = dataclasses.replace(origin, files=roots(module, registrar.entries))
    for entry in registrar.entries:
        host.catalog.add(dataclasses.replace(entry, origin=origin))
    host.origins[origin.plugin] = origin


def _check_version(module: Any) -> None:
    wanted = getattr(module, "KDCORE_HOOKS", hookspecs.HOOKS_VERSION)
    if not isinstance(wanted, int):
        raise PluginError(f"KDCORE_HOOKS is {wanted!r}", fix=f"Write KDCORE_HOOKS = {hookspecs.HOOKS_VERSION}.")
    if wanted > hookspecs.HOOKS_VERSION:
        raise PluginError(f"it needs kdcore hooks {wanted}, this is {hookspecs.HOOKS_VERSION}", fix="Upgrade kdcore.")


def _check_hooks(module: Any) -> None:
    """Finds what pluggy would pass over in silence: a misspelt hook, a forgotten decorator, a wrapper."""
    known = [name for name in vars(hookspecs) if re.match(r"kdcore_\w+$", name)]
    marked = 0
    names = vars(module) if isinstance(module, ModuleType) else dir(module)
    for name, value in [(name, getattr(module, name)) for name in names]:
        options = getattr(value, "kdcore_impl", None) if isroutine(value) else None  # others may answer to any name
        if isinstance(options, dict):
            marked += 1
            _check_hook(options.get("specname") or name, options, known)
        elif name in known and callable(value):
            raise PluginError(f"{name} is not marked as a hook", fix="Write @kdcore.hookimpl above it.")
    if not marked:
        raise PluginError("it implements no hook", fix="Write @kdcore.hookimpl above def kdcore_register(registry).")


def _check_hook(name: str, options: dict[str, Any], known: list[str]) -> None:
    if options.get("wrapper") or options.get("hookwrapper"):
        raise PluginError(f"{name} is a wrapper; kdcore calls plain hooks alone", fix="Write @kdcore.hookimpl.")
    if name not in known and not options.get("optionalhook"):
        raise PluginError(f"{name!r} is no hook", fix=suggest(name, known))
