"""Where registered things come from, and whose code an error arose in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb

from .errors import KdError

OWN = "own"
"""The plugin of what kdcore.distill was handed in Python."""


@dataclass(frozen=True)
class Origin:
    """Where a registered thing comes from.

    Args:
        plugin: its name.
        distribution: that ships it; empty for a single file.
        version: of the distribution.
        files: the plugin's source: module files and package folders.
        content: key of code that lies in no file, e.g. of a notebook's.
    """

    plugin: str
    distribution: str = ""
    version: str = ""
    files: tuple[Path, ...] = ()
    content: str = ""

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version})" if self.distribution else self.plugin

    def code(self) -> dict[str, str]:
        """Identity of the plugin's code on disk now: distribution version and sha256 of its source files."""
        return {"plugin": self.plugin, "version": self.version, "source": self.content + _digest_files(self.files)}


def _digest_files(roots: tuple[Path, ...]) -> str:
    """sha256 of names and contents, wherever the files lie; empty for the core, which kdcore.NUMERICS speaks for."""
    if not roots:
        return ""
    total = hashlib.sha256()
    for root in roots:
        for file in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
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
    """Notes which plugin's code raised ``error``: the deepest frame that lies in a plugin's files.

    An error that kdcore raised on purpose says where and how to fix it, so it is left as it is.
    """
    if is_placed(error) or isinstance(error, KdError):
        return
    frames = [(Path(frame.f_code.co_filename).resolve(), line) for frame, line in walk_tb(error.__traceback__)]
    owners = [(root, origin) for origin in origins for root in origin.files]
    for file, line in reversed(frames):
        for root, origin in owners:
            if file == root or root in file.parents:
                error.add_note(f"in plugin {origin}, {file} line {line}")
                return


def is_placed(error: BaseException) -> bool:
    """True if a note says the line of a plugin's code."""
    return any(note.startswith("in plugin ") and " line " in note for note in getattr(error, "__notes__", ()))


def is_blamed(error: BaseException) -> bool:
    """True if a plugin was named as the place where ``error`` arose."""
    return any(note.startswith("in plugin ") for note in getattr(error, "__notes__", ()))
