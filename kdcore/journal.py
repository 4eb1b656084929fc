"""The journal of a run: one line a fact, appended and fsync'd; what a resume replays."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .codec import canonical
from .errors import StorageError
from .files import make_folder, storing, sync
from .locks import lock, lock_file
from .plan import Json
from .reading import parse_json, read_plain

FIX = "Move the run's folder away and run again: finished stages are in the store."


class Journal:
    """Appends records to a file; every line carries a checksum.

    Opening it reads what is there and changes nothing. A torn last line, which a crash can leave, is passed over, and
    cut off before the next append; damage anywhere else is an error: everything after it would be guesswork.

    Two processes may append to one journal: each takes the file's lock, and first reads what the other wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._end = 0  # bytes of whole lines that were read or written
        with storing(path), suppress(FileNotFoundError):
            self._take(read_plain(path))

    def append(self, record: dict[str, Json]) -> None:
        """Adds a record; on return it is durable.

        Raises:
            StorageError: it could not be written; the journal is as it was.
        """
        line = _line(record)
        with storing(self.path, len(line)):
            make_folder(self.path.parent)
            new = not self.path.exists()
            with lock_file(self.path) as handle:
                lock(handle)
                self._catch_up(handle)
                _write(handle, line, self._end)
            if new:
                sync(self.path.parent)
        self.records.append(record)
        self._end += len(line)

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        """The records of one kind, oldest first."""
        return (record for record in self.records if record["kind"] == kind)

    def keys(self) -> set[str]:
        """Every stage's key that a record names."""
        single = {record["key"] for record in self.records if "key" in record}
        return single.union(*(record["keys"] for record in self.records if "keys" in record))

    def _take(self, data: bytes) -> None:
        *lines, torn = data.split(b"\n")
        self.records += [_record(line, self.path, len(self.records) + n) for n, line in enumerate(lines, 1)]
        self._end += len(data) - len(torn)

    def _catch_up(self, handle: int) -> None:
        size = os.fstat(handle).st_size
        if size < self._end:
            raise StorageError("it was cut or replaced while the run went on", where=str(self.path), fix=FIX)
        self._take(os.pread(handle, size - self._end, self._end))
        if size > self._end:  # nobody else writes now, so this is the last line of a process that died
            os.ftruncate(handle, self._end)


def _write(handle: int, line: bytes, offset: int) -> None:
    done = 0
    try:
        while done < len(line):
            done += os.pwrite(handle, line[done:], offset + done)
        os.fsync(handle)
    except BaseException:
        with suppress(OSError):  # a half line in the middle would make what is appended later unreadable
            os.ftruncate(handle, offset)
        raise


def _line(record: dict[str, Json]) -> bytes:
    text = canonical(record)
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    checksum, _, text = line.partition(b" ")
    if checksum != f"{zlib.crc32(text):08x}".encode():
        raise StorageError(f"line {number} is damaged", where=str(path), fix=FIX)
    try:
        return _checked(parse_json(text))
    except (ValueError, TypeError) as error:  # the checksum is no seal: anybody can write one
        raise StorageError(f"line {number} is no record: {error}", where=str(path), fix=FIX) from error


def _checked(record: Any) -> dict[str, Any]:
    """What every reader of a record relies on."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str):
        raise ValueError("it has no kind")
    texts = [record.get("key", ""), *record.get("keys", ()), *record.get("names", ())]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a key or a name is not text")
    return dict(record)
