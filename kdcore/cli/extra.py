"""Commands that plugins bring."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from ..errors import PluginError
from ..origin import blame_by_traceback
from ..plugins import PluginHost
from ..registry import Entry


def add_commands(app: typer.Typer, host: PluginHost, taken: set[str], arguments: list[str]) -> None:
    """Adds every registered command under its short name, or under ``plugin/name`` where that is taken.

    Only the one that was asked for is imported, so that a broken or a slow one does not spoil ``--help``.
    """
    entries = host.catalog.all("command")
    short = [entry.name for entry in entries]
    for entry in entries:
        free = entry.name not in taken and short.count(entry.name) == 1
        name = entry.name if free else entry.full_name
        app.command(name, help=entry.about)(_loaded(entry, host) if arguments[:1] == [name] else _stub)


def _stub() -> None:
    """Listed, not called."""


def _loaded(entry: Entry, host: PluginHost) -> Callable[..., Any]:
    function = entry.load()
    if not callable(function):
        where = f"command {entry.full_name!r}"
        raise PluginError(f"{function!r} is no function", where=where, fix="Register a function that typer can call.")

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:
            blame_by_traceback(error, host.origins.values())
            raise

    return call
