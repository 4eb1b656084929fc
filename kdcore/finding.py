"""Where plugins lie: entry points, single files, the source that counts as a plugin's code, the line of an error."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

from .errors import PluginError
from .registry import Entry

GROUP = "kdcore"
NOT_A_PLUGINS_OWN = {"kdcore", "torch"} | set(sys.stdlib_module_names)
_HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- entry points


def installed(broken: dict[str, str]) -> dict[str, list[EntryPoint]]:
    """Entry points by name; a distribution whose metadata cannot be read is noted in ``broken``."""
    found: dict[str, list[EntryPoint]] = {}
    for point in _points(broken):
        same = found.setdefault(point.name, [])
        if not any(point.value == p.value and owner(point) == owner(p) for p in same):
            same.append(point)
    return found


def _points(broken: dict[str, str]) -> list[EntryPoint]:
    try:
        return list(entry_points(group=GROUP))
    except Exception:  # one distribution's entry_points.txt is malformed, maybe of another group: look at each alone
        return [point for dist in distributions() for point in _points_of(dist, broken)]


def _points_of(dist: Distribution, broken: dict[str, str]) -> list[EntryPoint]:
    try:
        return [point for point in dist.entry_points if point.group == GROUP]
    except Exception as error:
        text = dist.read_text("entry_points.txt") or ""
        if re.search(rf"^\s*\[\s*{GROUP}\s*\]", text, re.MULTILINE):
            broken[dist.name] = f"{dist.name} {dist.version}: its entry_points.txt cannot be read: {error}"
        return []


def owner(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution; empty where its metadata says neither."""
    return (point.dist.name or "", point.dist.version or "") if point.dist else ("", "")


# ---------------------------------------------------------------- single files


def load_file(file: Path) -> ModuleType:
    """A Python file as a module under its stem, so that ``"stem:Name"`` targets resolve."""
    name = file.stem
    if not file.is_file():
        raise PluginError("no such file", fix="Give the path of a .py file.")
    if _is_other_module(name, file):
        raise PluginError(f"a module {name!r} exists already", fix="Rename the file.")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PluginError("not a Python file", fix="Give the path of a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_other_module(name: str, file: Path) -> bool:
    """True if ``import name`` means something else: a file called json.py must not replace json for everyone."""
    if name in sys.modules:
        return Path(getattr(sys.modules[name], "__file__", None) or "").resolve() != file
    spec = find_spec(name) if "." not in name else None
    return spec is not None and Path(spec.origin or "").resolve() != file


# ---------------------------------------------------------------- source


def roots(plugin: Any, entries: Iterable[Entry]) -> tuple[Path, ...]:
    """The module files and package folders that hold a plugin's code: its own, and those that its targets name.

    Of a plugin that is no module, those that it names as text: the rest is in its origin's content.
    """
    targets = [target for entry in entries for target in (entry.target, entry.options) if target is not None]
    if isinstance(plugin, ModuleType):
        names = {plugin.__name__} | {_module_of(target) for target in targets}
    else:
        names = {_module_of(target) for target in targets if isinstance(target, str)}
    tops = {name for name in names if name.partition(".")[0] not in NOT_A_PLUGINS_OWN}
    found = {root for name in tops if (root := _root(name)) is not None}
    return tuple(sorted(found, key=lambda root: (root.name, str(root))))


def _module_of(target: Any) -> str:
    return target.partition(":")[0] if isinstance(target, str) else str(getattr(target, "__module__", None) or "kdcore")


def _root(name: str) -> Path | None:
    """The folder of the outermost package with an ``__init__.py``, or the file of a module; imports nothing of it."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        try:
            spec = find_spec(".".join(parts[:length]))
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        if spec.origin is not None and Path(spec.origin).is_file():
            path = Path(spec.origin).resolve()
            return path.parent if path.name == "__init__.py" else path
    return None


# ---------------------------------------------------------------- errors


def reason(error: BaseException, fallback: str) -> str:
    """An error of loading in one line, with the line of the plugin's code."""
    text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    place = place_of(error) or (f", {fallback}" if fallback and fallback not in text else "")
    return re.sub(r"\s+", " ", f"{text.rstrip('.')}{place}")


def place_of(error: BaseException) -> str:
    """``, file line n`` of the deepest frame outside of kdcore, pluggy and the import system; else nothing."""
    if isinstance(error, SyntaxError) and error.filename:
        return f", {error.filename} line {error.lineno}"
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    outside = [(file, line) for file, line in frames if not _is_machinery(file)]
    return f", {outside[-1][0]} line {outside[-1][1]}" if outside else ""


def _is_machinery(file: str) -> bool:
    path = Path(file)
    return file.startswith("<") or path.parent.name in {"importlib", "metadata", "pluggy"} or _HERE in path.parents


def describe(value: Any) -> str:
    """A value that should have been a module, in words."""
    return f"the {type(value).__name__} {getattr(value, '__name__', value)!r}"
