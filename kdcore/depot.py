"""What of a store travels: results and checkpoints, between a run and the machines that train for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .store import Store


class Depot(Protocol):
    """A store, as executors see it that train elsewhere: what goes out and what comes in."""

    def result(self, key: str) -> dict[str, Any] | None:
        """The verified result of ``key``; None if there is none, or if it is damaged."""
        ...

    def pack(self, target: Path, keys: list[str]) -> None:
        """Writes the results of ``keys`` to one tar file.

        Raises:
            StorageError: one of them is damaged or missing.
        """
        ...

    def unpack(self, source: Path) -> list[str]:
        """Adds the results of a tar file: all of them, or nothing if one is damaged. Returns the new keys.

        Raises:
            StorageError: it is no such file, it was damaged on its way, or there is no room.
        """
        ...

    def carried(self, key: str) -> tuple[int, dict[str, bytes]] | None:
        """Step and files of the newest checkpoint of ``key``; None if there is none."""
        ...

    def adopt_checkpoint(self, key: str, step: int, files: Mapping[str, bytes]) -> Path:
        """Commits what :meth:`carried` gave on a machine with the same kdcore; returns its folder.

        Raises:
            StorageError: it was damaged on its way, or there is no room.
        """
        ...


def open_depot(root: str | Path) -> Depot:
    """That of the store in a folder, which is made when something is written."""
    return Store(root)
