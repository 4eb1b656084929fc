"""The journal of a run: one line a fact, appended and fsync'd; what a resume replays."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import StorageError
from .files import storage_error
from .plan import Json, canonical


class Journal:
    """Appends records to a file; every line carries a checksum.

    Opening it reads what is there. A torn last line, which a crash can leave, is cut off; damage anywhere else is an
    error, because everything after it would be guesswork.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self.records, good = _parse(path.read_bytes(), path)
            os.truncate(path, good)
        except OSError as error:
            raise storage_error(error, path, 0) from error

    def append(self, record: dict[str, Json]) -> None:
        """Adds a record; on return it is durable."""
        line = _line(record)
        try:
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self.path, len(line)) from error
        self.records.append(record)

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        """The records of one kind, oldest first."""
        return (record for record in self.records if record["kind"] == kind)


def _line(record: dict[str, Json]) -> bytes:
    text = canonical(record)
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _parse(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    records: list[dict[str, Any]] = []
    good = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        record = _record(line)
        if record is None:
            if good + len(line) < len(data) or line.endswith(b"\n"):
                fix = "Move the run's folder away and run again: finished stages are in the store."
                raise StorageError(f"line {number} is damaged", where=str(path), fix=fix)
            break
        records.append(record)
        good += len(line)
    return records, good


def _record(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != f"{zlib.crc32(text):08x}".encode():
        return None
    return dict(json.loads(text))
