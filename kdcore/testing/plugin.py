"""Checks of a whole plugin: what importing it does, what it registers, and which names of kdcore it uses."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import SkipTest

from ..origin import Origin
from ..registry import Entry, Registrar
from . import probe
from .subject import Subject, check, require

PUBLIC = ("kdcore", "kdcore.data", "kdcore.losses", "kdcore.testing", "kdcore.testing.strategies")
"""Modules whose ``__all__`` plugins may use."""
LONGEST = 60
"""Seconds that importing a plugin may take before the probe gives up."""


def registered(module: ModuleType) -> list[Entry]:
    """What the plugin registers now; an observer without ``kdcore_register`` registers nothing."""
    registrar = Registrar(Origin(module.__name__))
    if hasattr(module, "kdcore_register"):
        module.kdcore_register(registrar)
    return registrar.entries


@cache
def probed(module: ModuleType) -> tuple[dict[str, Any], str]:
    """What a fresh process says of importing the plugin, and what the plugin printed there."""
    plugin = str(module.__file__) if _is_single_file(module) else module.__name__
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", probe.__name__, plugin],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    printed, mark, found = done.stdout.rpartition(probe.MARK)
    last = done.stderr.strip().rpartition("\n")[2]
    require(mark, f"a fresh process cannot import it: {last}", "Repair the import.")
    return json.loads(found), (printed + done.stderr).strip()


def _is_single_file(module: ModuleType) -> bool:
    """True for a file that is not on the search path, given to ``--plugin-file``."""
    file = Path(module.__file__ or "")
    return "." not in module.__name__ and file.name != "__init__.py" and str(file.parent) not in sys.path


def _unchanged(subject: Subject, *names: str) -> None:
    changed = [name for name in probed(subject.target)[0]["changed"] if name in names]
    fix = "Do it in the function that needs it, not while the module is imported."
    require(not changed, f"importing it changes the process's {' and '.join(changed)}", fix)


@check
def imports_no_torch(subject: Subject) -> None:
    """Importing it imports neither torch nor another heavy library.

    ``kdcore --help`` and the check of a recipe take 0.2 s; torch alone takes seconds. Register targets as text.
    """
    if _is_single_file(subject.target):
        raise SkipTest("a single file is imported by the runs that name it, not by every command")
    heavy = probed(subject.target)[0]["imported"]
    fix = 'Register "package.module:Name", and options as text to a module without it.'
    require(not heavy, f"importing it imports {', '.join(heavy)}", fix)


@check
def prints_nothing(subject: Subject) -> None:
    """Importing it prints nothing.

    The output of commands is read by programs.
    """
    printed = probed(subject.target)[1]
    require(not printed, f"importing it prints {printed[:60]!r}", "Leave it out, or use the logging module.")


@check
def leaves_the_environment(subject: Subject) -> None:
    """Importing it changes neither working folder, environment variables nor ``sys.path``.

    Every command imports all plugins, whether their names are used or not.
    """
    _unchanged(subject, "working folder", "environment", "module search path")


@check
def leaves_random_numbers(subject: Subject) -> None:
    """Importing it neither seeds nor draws random numbers.

    Installing a plugin must not change another one's run.
    """
    _unchanged(subject, "random numbers")


@check
def starts_nothing(subject: Subject) -> None:
    """Importing it starts no thread and handles no signal.

    Ctrl-C ends a run after a checkpoint; a handler of a plugin's own would take that away.
    """
    _unchanged(subject, "threads", "signal handlers")


@check
def registers_alike(subject: Subject) -> None:
    """Registering twice gives the same names and targets.

    Worker processes register for themselves.
    """
    first, second = (
        [(e.kind, e.name, e.target, e.options, e.about) for e in registered(subject.target)] for _ in range(2)
    )
    require(first == second, "kdcore_register() gives other entries the second time", "Keep no state in the module.")


@check
def targets_load(subject: Subject) -> None:
    """Everything that it registers can be imported, with its options.

    A misspelt target shows only when a recipe names it.
    """
    for entry in registered(subject.target):
        entry.load()
        entry.options_class()


@check
def options_are_described(subject: Subject) -> None:
    """Every option says what to write.

    ``kdcore plugins NAME`` shows it, and so does the error for a value that does not fit.
    """
    for entry in _loadable(subject):
        for name, field in entry.options_class().model_fields.items():
            fix = 'Write kdcore.Field(..., description="a number above 0").'
            require(field.description, f"option {name!r} of {entry.kind} {entry.name!r} has no description", fix)


def _loadable(subject: Subject) -> Iterator[Entry]:
    """Entries whose options can be imported; others fail in :func:`targets_load`."""
    for entry in registered(subject.target):
        try:
            entry.options_class()
        except Exception:
            continue
        yield entry


@check
def uses_public_names(subject: Subject) -> None:
    """Its source imports only public names of kdcore.

    Others move without notice.
    """
    if subject.target.__name__.partition(".")[0] == "kdcore":
        return
    for file in _sources(subject.target):
        for name in _imported(ast.parse(file.read_bytes())):
            fix = f"Use what {', '.join(PUBLIC[:3])} export in __all__."
            require(_is_public(name), f"{file.name} imports {name}", fix)


def _sources(module: ModuleType) -> list[Path]:
    from ..finding import roots

    found = roots(module, registered(module)) or (Path(str(module.__file__)),)
    return [file for root in found for file in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]


def _imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of kdcore that a source imports, or reads as attributes of the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "kdcore")
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "kdcore":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kdcore":
            yield f"kdcore.{node.attr}"


def _is_public(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return name in PUBLIC or (module in PUBLIC and last in importlib.import_module(module).__all__)
