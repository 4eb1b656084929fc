"""A disk that fills up, or cannot be written, at a chosen operation."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kdcore.files


@dataclass
class Disk:
    """Counts operations; those from ``first`` on, ``length`` of them, fail."""

    first: int = 0
    length: int = 1
    code: int = errno.ENOSPC
    count: int = 0

    def fails(self) -> bool:
        self.count += 1
        return self.first and self.first <= self.count < self.first + self.length

    def error(self) -> OSError:
        return OSError(self.code, os.strerror(self.code))

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.fails():
                raise self.error()
            return real(*arguments, **options)

        return wrapped


@contextmanager
def failing(first: int = 0, length: int = 1, code: int = errno.ENOSPC) -> Iterator[Disk]:
    """Every mkdir, write, fsync and rename of kdcore counts; a write that fails has written the first half."""
    disk = Disk(first, length, code)
    real_write, real_pwrite = kdcore.files.write_file, os.pwrite

    def write_file(path: Path, data: bytes) -> None:
        if disk.fails():
            Path(path).write_bytes(data[: len(data) // 2])
            raise disk.error()
        real_write(path, data)

    def pwrite(handle: int, data: bytes, offset: int) -> int:
        if disk.fails():
            real_pwrite(handle, data[: len(data) // 2], offset)
            raise disk.error()
        return real_pwrite(handle, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kdcore.files, "write_file", write_file)
        patch.setattr(os, "pwrite", pwrite)
        for name in ("fsync", "rename", "mkdir"):
            patch.setattr(os, name, disk.wrap(getattr(os, name)))
        yield disk


def damage(path: Path, chance: Any) -> str:
    """Flips a bit of a file, or cuts it."""
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    if chance.random() < 0.3:
        path.write_bytes(data[:place])
        return f"{path.name} cut at {place}"
    bit = chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name} byte {place} bit {bit}"


def stored_weights(root: Path) -> list[str]:
    """Hashes of the students in all results that have their real name."""
    files = root.glob("store/results/*/student.safetensors")
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files if len(path.parent.name) == 64)
