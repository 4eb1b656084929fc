"""Faults to order, for tests of kdcore and of plugins: a disk, a batch, a device, a network or a home that fails.

::

    from kdcore.testing import faults

    with faults.failing_disk(first=7), pytest.raises(kdcore.StorageError):
        ...                                    # the 7th write, fsync, rename or mkdir finds no room

Each is a context manager that patches this process alone: worker processes (``jobs = 2``) see none of them but
:func:`unwritable_home`, which is a matter of environment variables.
"""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .. import files

__all__ = ["Disk", "damage", "failing_disk", "no_network", "out_of_memory", "poisoned_batch", "unwritable_home"]

NOWHERE = "/dev/null/home"  # nothing can be made there, not even by root


# ---------------------------------------------------------------- disk


@dataclass
class Disk:
    """Counts operations from 1; those from ``first`` on, ``length`` of them, fail. ``first = 0`` only counts."""

    first: int = 0
    length: int = 1
    code: int = errno.ENOSPC
    count: int = 0

    def check(self) -> None:
        """Counts an operation.

        Raises:
            OSError: it is one that fails.
        """
        self.count += 1
        if 0 < self.first <= self.count < self.first + self.length:
            raise OSError(self.code, os.strerror(self.code))


@contextmanager
def failing_disk(first: int = 0, length: int = 1, code: int = errno.ENOSPC) -> Iterator[Disk]:
    """Every mkdir, write, fsync and rename by which kdcore stores something counts; a write that fails is half done.

    Args:
        first: the number of the first operation that fails, from 1; 0 fails none, to count them.
        length: how many fail from there on.
        code: of the error: ``errno.ENOSPC`` for a full disk, ``errno.EROFS`` for a read-only one.
    """
    disk = Disk(first, length, code)
    real_write, real_pwrite = files.write_file, os.pwrite

    def write_file(path: Path, data: bytes) -> None:
        try:
            disk.check()
        except OSError:
            Path(path).write_bytes(data[: len(data) // 2])
            raise
        real_write(path, data)

    def pwrite(handle: int, data: bytes, offset: int) -> int:
        try:
            disk.check()
        except OSError:
            real_pwrite(handle, data[: len(data) // 2], offset)
            raise
        return real_pwrite(handle, data, offset)

    with ExitStack() as patches:
        patches.enter_context(patch.object(files, "write_file", write_file))
        patches.enter_context(patch.object(os, "pwrite", pwrite))
        for name in ("fsync", "rename", "mkdir"):
            patches.enter_context(patch.object(os, name, _checked(disk, getattr(os, name))))
        yield disk


def _checked(disk: Disk, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        disk.check()
        return real(*arguments, **options)

    return call


def damage(path: Path, chance: random.Random) -> str:
    """Flips one bit of a file, or cuts it, three times in ten; says which, for a test's message."""
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    if chance.random() < 0.3:
        path.write_bytes(data[:place])
        return f"{path.name} cut at {place}"
    bit = chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name} byte {place} bit {bit}"


# ---------------------------------------------------------------- steps


@contextmanager
def poisoned_batch(step: int, value: float = float("nan")) -> Iterator[None]:
    """One pixel of one sample becomes ``value`` in the batch of this step, of every stage that has so many."""
    from ..training.session import open_session as real

    def open_session(*arguments: Any) -> Any:
        session: Any = real(*arguments)
        session.source = _Poisoned(session.source, step, value)
        return session

    with patch("kdcore.training.loop.open_session", open_session):
        yield


class _Poisoned:
    """A source with one bad batch; everything else is the real source's."""

    def __init__(self, source: Any, step: int, value: float) -> None:
        self._source, self._step, self._value = source, step, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def batch(self, step: int) -> Any:
        batch = self._source.batch(step)
        if step != self._step:
            return batch
        inputs = batch.inputs.clone()
        inputs[(0,) * inputs.ndim] = self._value
        return replace(batch, inputs=inputs)


@contextmanager
def out_of_memory(step: int, images: int = 0) -> Iterator[list[int]]:
    """A device without room for more than ``images`` images at once at this step, of every stage that has so many.

    Every ``ctx.forward`` of the step with more images raises ``torch.OutOfMemoryError``; one with fewer succeeds.

    Yields:
        The number of images of each forward pass of that step, in order, those that failed included.
    """
    import torch

    from ..training.step import StepContext

    tried: list[int] = []
    real = StepContext.forward

    def forward(self: StepContext, name: str, *inputs: Any, **options: Any) -> Any:
        if self.step == step:
            tried.append(max((len(x) for x in inputs if isinstance(x, torch.Tensor)), default=0))
            if tried[-1] > images:
                raise torch.OutOfMemoryError(f"no room for {tried[-1]} images (a fault to order)")
        return real(self, name, *inputs, **options)

    with patch.object(StepContext, "forward", forward):
        yield tried


# ---------------------------------------------------------------- surroundings


@contextmanager
def no_network() -> Iterator[list[str]]:
    """No socket can be made and no name looked up.

    Yields:
        What was tried. An attempt raises OSError, which code may well survive: check that the list is empty.
    """
    tried: list[str] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        tried.append(repr(arguments[-1:]))
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    with patch.object(socket.socket, "__init__", refuse), patch.object(socket, "getaddrinfo", refuse):
        yield tried


@contextmanager
def unwritable_home() -> Iterator[None]:
    """Home and the folders for settings, caches and data cannot be made, in this process and those that it starts."""
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "MPLCONFIGDIR")
    with patch.dict(os.environ, dict.fromkeys(names, NOWHERE)):
        yield
