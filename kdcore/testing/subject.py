"""What is checked, what a check is, and how checks become a table or pytest's tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from traceback import walk_tb
from types import ModuleType
from typing import Any, Literal
from unittest import SkipTest

from ..errors import PluginError, RecipeError, suggest
from ..finding import place_of
from ..options import Options, validate
from ..origin import Origin
from ..plugins import PluginHost, load_plugins, register
from ..registry import Catalog, Entry, Target

KINDS = ("strategy", "controller", "loss", "model")
"""Kinds of registered things that have checks; a plugin as a whole is one more."""


@cache
def _installed() -> PluginHost:
    return load_plugins()


@dataclass(frozen=True)
class Subject:
    """One thing to be checked.

    Args:
        kind: ``strategy``, ``controller``, ``loss`` or ``model``; or ``plugin`` for a whole plugin.
        name: what it is called in the names of tests.
        target: what is registered, or its text form ``"package.module:Name"``; for a plugin its module.
        options: the options to check it with; or their class, or its text form, whose ``example`` is taken; default:
            the class is the target's attribute ``Options``.
        catalog: where the names in its stages are found; default: what is installed.
    """

    kind: str
    name: str
    target: Target
    options: Options | Target = None
    catalog: Catalog = field(default_factory=lambda: _installed().catalog, repr=False, compare=False)

    def load(self) -> Any:
        """The registered object, imported now if it was given as text."""
        return self.entry.load()

    def example(self) -> Options:
        """The options that it is checked with.

        Raises:
            AssertionError: the class has required fields and no ``example``.
        """
        if isinstance(self.options, Options):
            return self.options
        cls = self.entry.options_class()
        try:
            return validate(cls, cls.example, f"{self.kind} {self.name}")
        except RecipeError as error:
            fix = f"Give {cls.__name__} a ClassVar `example`, a mapping with what is required."
            raise AssertionError(f"{error} {fix}") from None

    @property
    def entry(self) -> Entry:
        """As the catalog holds it."""
        options = type(self.options) if isinstance(self.options, Options) else self.options
        return Entry(self.kind, self.name, Origin("checked"), self.target, options)

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


@dataclass(frozen=True)
class Check:
    """A promise that subjects of one kind keep.

    Args:
        kind: of the subjects.
        name: what it is called in the names of tests.
        about: the promise in one line.
    """

    kind: str
    name: str
    about: str
    body: Callable[[Subject], None] = field(repr=False)

    def __call__(self, subject: Subject) -> None:
        """Checks the subject.

        Raises:
            AssertionError: the promise is broken; says how, and how to repair it.
            unittest.SkipTest: the promise does not concern this subject; says why.
        """
        try:
            self.body(subject)
        except (AssertionError, SkipTest):
            raise
        except (Exception, SystemExit) as error:
            fix = " ".join(getattr(error, "__notes__", ()))
            place = _own_line(error, subject.target) or place_of(error)
            raise AssertionError(f"it raised {type(error).__name__}: {error}{place}. {fix}".rstrip()) from error


def _own_line(error: BaseException, target: Target) -> str:
    """The deepest line of the file that defines the target: an error often arises in a library that it calls."""
    file = getattr(sys.modules.get(str(getattr(target, "__module__", ""))), "__file__", None)
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return f", {file} line {lines[-1]}" if lines else ""


@contextmanager
def advising(fix: str) -> Iterator[None]:
    """Lets any error of the block say how to repair it."""
    try:
        yield
    except Exception as error:
        error.add_note(fix)
        raise


def check(body: Callable[[Subject], None]) -> Check:
    """Makes a check of a function: its kind is the file it is in, its promise the first line of its docstring."""
    kind, name = body.__module__.rpartition(".")[2], body.__name__.replace("_", "-")
    assert body.__doc__ is not None, "a check says its promise"
    return Check(kind, name, body.__doc__.strip().partition("\n")[0].rstrip("."), body)


def require(holds: object, what: str, fix: str) -> None:
    """Raises AssertionError with ``what`` is wrong and how to ``fix`` it, unless ``holds``; under ``python -O`` too."""
    if not holds:
        raise AssertionError(f"{what if what.endswith(('.', '?')) else f'{what}.'} {fix}")


def checks_of(subject: Subject) -> tuple[Check, ...]:
    """Every check of the subject's kind, in the order of the file that holds them."""
    module = importlib.import_module(f"{__package__}.{subject.kind}")
    return tuple(found for found in vars(module).values() if isinstance(found, Check))


def subjects_of(plugin: str | ModuleType) -> tuple[Subject, ...]:
    """The plugin itself, and everything of a kind with checks that it registers.

    Args:
        plugin: name of an installed plugin, or a module with ``kdcore_register``.

    Raises:
        PluginError: no such plugin, or it cannot be loaded; says why.
    """
    host = _installed() if isinstance(plugin, str) else _host_of(plugin)
    name = plugin if isinstance(plugin, str) else _name(host, plugin)
    if name not in host.origins:
        raise PluginError(
            host.broken.get(name, f"no plugin {name!r} is installed"),
            where="kdcore.testing",
            fix="Repair it." if name in host.broken else suggest(name, host.origins),
        )
    whole = Subject("plugin", name, host.manager.get_plugin(name), catalog=host.catalog)
    entries = [e for kind in KINDS for e in host.catalog.all(kind) if e.origin.plugin == name]
    return (whole, *(Subject(e.kind, e.name, e.target, e.options, host.catalog) for e in entries))


def _host_of(module: ModuleType) -> PluginHost:
    """The installed plugins and ``module``, if it is not one of them."""
    if _installed().manager.is_registered(module):
        return _installed()
    host = load_plugins()
    register(host, Origin(module.__name__), module)
    return host


def _name(host: PluginHost, module: ModuleType) -> str:
    return host.manager.get_name(module) or module.__name__


@dataclass(frozen=True)
class Verdict:
    """What became of one check: ``reason`` says why it failed or does not apply."""

    check: Check
    state: Literal["passed", "failed", "skipped"]
    reason: str = ""


def verdicts(subject: Subject) -> Iterator[Verdict]:
    """Runs the subject's checks one after another."""
    for one in checks_of(subject):
        try:
            one(subject)
        except SkipTest as reason:
            yield Verdict(one, "skipped", str(reason))
        except AssertionError as problem:
            yield Verdict(one, "failed", str(problem))
        else:
            yield Verdict(one, "passed")


@dataclass(frozen=True)
class Case:
    """A check and its subject, ready to be called."""

    subject: Subject
    check: Check

    def __call__(self) -> None:
        self.check(self.subject)

    def __str__(self) -> str:
        return f"{self.subject}-{self.check.name}"


def parametrize_with_checks(*what: str | ModuleType | Subject) -> Callable[[Any], Any]:
    """A decorator that runs a pytest function, with the one argument ``check``, once for every check.

    Args:
        what: installed plugins by name, modules with ``kdcore_register``, and single subjects, e.g. those of
            :func:`subjects_of` but one.
    """
    import pytest

    subjects = [s for item in what for s in ((item,) if isinstance(item, Subject) else subjects_of(item))]
    return pytest.mark.parametrize("check", [Case(s, c) for s in subjects for c in checks_of(s)], ids=str)
