"""Loads plugins, keeps the broken ones apart, and calls observers."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from . import hookspecs
from .errors import PluginError, RecipeError, suggest
from .registry import Catalog, Origin, Registrar

GROUP = "kdcore"
CORE = "core"


@dataclass
class PluginHost:
    """The loaded plugins: catalog of names, broken ones with the reason, muted observers."""

    manager: pluggy.PluginManager
    catalog: Catalog
    origins: dict[str, Origin] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    muted: dict[str, str] = field(default_factory=dict)
    strict: bool = False

    def emit(self, hook: str, **arguments: Any) -> None:
        """Calls an observer hook of every plugin. One that raises is muted, or fatal under ``strict``."""
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            if impl.plugin_name in self.muted:
                continue
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except Exception as error:
                origin = self.origins[impl.plugin_name]
                message = f"{hook} raised {type(error).__name__}: {error}"
                if self.strict:
                    raise PluginError(message, where=f"plugin {origin}") from error
                self.muted[impl.plugin_name] = message
                print(f"kdcore: plugin {origin}: {message}; it is muted for this run", file=sys.stderr)

    def require(self, requirements: Iterable[str]) -> None:
        """Checks ``[plugins] require = ["name>=1.2"]``: a plugin or distribution by name, with an optional version."""
        from packaging.requirements import InvalidRequirement, Requirement

        for text in requirements:
            try:
                wanted = Requirement(text)
            except InvalidRequirement as error:
                raise RecipeError(f"{text!r}: {error}", where="plugins.require", fix='Write "name>=1.2".') from None
            if wanted.name in self.broken:
                raise PluginError(self.broken[wanted.name], where=f"plugin {wanted.name!r}")
            found = [o for o in self.origins.values() if wanted.name in (o.plugin, o.distribution)]
            if not found:
                known = [*self.origins, *(o.distribution for o in self.origins.values() if o.distribution)]
                raise PluginError(f"{text!r} is not installed", where="plugins.require", fix=suggest(wanted.name, known))
            if not wanted.specifier.contains(found[0].version or "0", prereleases=True):
                raise PluginError(f"{text!r} is required, {found[0]} is installed", where="plugins.require")


def load_plugins(block: Iterable[str] = (), files: Iterable[str | Path] = (), strict: bool = False) -> PluginHost:
    """Loads the core, every installed plugin and single files, sorted by name.

    Args:
        block: names to leave out; the core cannot be.
        files: Python files that are loaded as plugins, named by their stem.
        strict: an observer that raises ends the run.
    """
    from . import builtin

    manager = pluggy.PluginManager("kdcore")
    manager.add_hookspecs(hookspecs)
    host = PluginHost(manager, Catalog(), strict=strict)
    blocked = set(block)
    _register(host, Origin(CORE), builtin)
    for name, points in sorted(_installed().items()):
        if name not in blocked:
            _attempt(host, name, lambda points=points: _load_entry_point(points))
    for file in map(Path, files):
        if file.stem not in blocked:
            _attempt(host, file.stem, lambda file=file: _load_file(file))
    host.catalog.broken = host.broken
    return host


def _installed() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        same = found.setdefault(point.name, [])
        if not any(point.value == p.value and _dist(point) == _dist(p) for p in same):
            same.append(point)
    return found


def _dist(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("", "")


def _attempt(host: PluginHost, name: str, load: Callable[[], tuple[Origin, ModuleType]]) -> None:
    """Loads one plugin; whatever it raises, even SystemExit, only breaks that plugin."""
    origin = Origin(name)
    try:
        origin, module = load()
        if name in host.origins:
            raise PluginError(f"the name is taken by {host.origins[name]}", fix=f"Rename one, or -p no:{name}.")
        _register(host, origin, module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if name not in host.origins and host.manager.has_plugin(name):
            host.manager.unregister(name=name)
        host.broken[name] = f"{origin}: {_reason(error)}"


def _reason(error: BaseException) -> str:
    frames = [f for f in inspect.getinnerframes(error.__traceback__)] if error.__traceback__ else []
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}{place}"
    return re.sub(r"\s+", " ", text)


def _load_entry_point(points: list[EntryPoint]) -> tuple[Origin, ModuleType]:
    if len(points) > 1:
        owners = " and ".join(sorted(f"{name} {version}" for name, version in map(_dist, points)))
        raise PluginError(f"offered by {owners}", fix=f"Uninstall one, or -p no:{points[0].name}.")
    point = points[0]
    module = point.load()
    distribution, version = _dist(point)
    return Origin(point.name, distribution, version, _files(module)), module


def _load_file(file: Path) -> tuple[Origin, ModuleType]:
    if not file.is_file():
        raise PluginError("no such file", where=str(file))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise PluginError("not a Python file", where=str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # so that "stem:Name" targets resolve
    spec.loader.exec_module(module)
    return Origin(file.stem, files=file.resolve()), module


def _files(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    return path.parent if path.name == "__init__.py" else path


def _register(host: PluginHost, origin: Origin, module: ModuleType) -> None:
    _check_module(module)
    host.manager.register(module, origin.plugin)
    _check_names(module)
    registrar = Registrar(origin)
    for impl in host.manager.hook.kdcore_register.get_hookimpls():
        if impl.plugin_name == origin.plugin:
            impl.function(registrar)
    for entry in registrar.entries:
        host.catalog.add(entry)
    host.origins[origin.plugin] = origin


def _check_module(module: Any) -> None:
    if not isinstance(module, ModuleType):
        raise PluginError(f"the entry point names {module!r}", fix="Name a module that implements hooks.")
    wanted = getattr(module, "KDCORE_HOOKS", hookspecs.HOOKS_VERSION)
    if not isinstance(wanted, int) or wanted > hookspecs.HOOKS_VERSION:
        raise PluginError(f"needs kdcore hooks {wanted}, this is {hookspecs.HOOKS_VERSION}", fix="Upgrade kdcore.")


def _check_names(module: ModuleType) -> None:
    """A function marked as a hook whose name is none is a typo that pluggy would pass over."""
    known = [name for name in vars(hookspecs) if name.startswith("kdcore_")]
    for name, value in vars(module).items():
        if getattr(value, "kdcore_impl", None) is not None and name not in known:
            raise PluginError(f"{name!r} is no hook", fix=suggest(name, known))
