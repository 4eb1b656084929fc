"""Errors that a user meets: what went wrong, where, and how to fix it. One exit code each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class KdError(Exception):
    """Base of every error that kdcore raises on purpose.

    Args:
        what: what is wrong, with the value that was found.
        where: the key, file, stage or sample that it concerns.
        fix: what to write or do instead.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text.rstrip('.')}. {self.fix}".rstrip() if self.fix else text


class RecipeError(KdError):
    """The recipe or the command line asks for something that does not exist or does not fit."""

    exit_code = 2


class PluginError(KdError):
    """A plugin cannot be loaded, or broke its contract."""

    exit_code = 3


class StorageError(KdError):
    """A file of the store is missing, damaged, locked or cannot be written."""

    exit_code = 4


class DataError(KdError):
    """A data set, split or batch is not what training needs."""

    exit_code = 5


class NumericError(KdError):
    """A loss, gradient or weight stopped being finite."""

    exit_code = 6


class DeviceError(KdError):
    """A device is missing, or out of memory."""

    exit_code = 7


class PlanError(KdError):
    """A strategy or controller asks for something impossible, or does not replay."""

    exit_code = 8


class PreflightError(KdError):
    """A check before training failed and ``--strict`` was given."""

    exit_code = 9


class Interrupted(KdError):  # noqa: N818 - it is no error
    """A signal stopped the run after a checkpoint; the same command goes on from there."""

    def __init__(self, signal_number: int) -> None:
        name = {2: "Ctrl-C", 15: "SIGTERM"}.get(signal_number, f"signal {signal_number}")
        super().__init__(f"stopped by {name}", fix="Run the same command to go on.")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number  # type: ignore[misc]


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a bug in kdcore",
    2: "recipe or command line",
    3: "plugin",
    4: "storage: missing, damaged, locked or full",
    5: "data",
    6: "a value is not finite",
    7: "device or memory",
    8: "strategy or controller",
    9: "preflight check under --strict",
    130: "Ctrl-C; resume with the same command",
    143: "SIGTERM; resume with the same command",
}


SHORTEST_PART = 4  # letters that say which longer name is meant


def _holds(name: str, word: str) -> bool:
    return len(word) >= SHORTEST_PART and word in name


def suggest(word: str, known: Iterable[str]) -> str:
    """Says what may have been meant: ``did you mean 'x'?`` or the known names."""
    names = sorted(set(known))
    for fitting in (
        difflib.get_close_matches(word, names, n=1, cutoff=0.85),  # a slip of a letter
        sorted((name for name in names if name.endswith(f"_{word}")), key=len),
        sorted((name for name in names if _holds(name, word)), key=len),
        difflib.get_close_matches(word, names, n=1, cutoff=0.6),
    ):
        if fitting:
            return f"Did you mean {fitting[0]!r}?"
    return f"Known: {', '.join(names)}." if names else "None is registered."
