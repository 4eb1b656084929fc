"""Batches of images that are read when they are wanted: worker processes read ahead, in the order that was asked for.

All pixels come from :meth:`kdcore.Images.read`, which draws what it needs from a stateless :class:`Random`. So a batch
is the same bits for any number of workers, and reading can begin at any step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .. import errors
from ..errors import DeviceError, KdError, PluginError
from .random import Random
from .types import Images

Request: TypeAlias = tuple[np.ndarray[Any, Any], int | None]
"""Positions [B], int64, and the epoch whose training view is wanted; None for the evaluation view."""

STOPS = (signal.SIGINT, signal.SIGTERM)
AHEAD = 2  # batches a worker: one is being read while the other waits
LOST = ("DataLoader worker (pid", "unable to allocate shared memory")  # torch's words where a process died, or was to


@dataclass(frozen=True)
class Failed:
    """An error of kdcore as it leaves a worker; torch would rebuild it from its text alone."""

    kind: type[KdError]
    what: str
    where: str
    fix: str

    def error(self) -> KdError:
        return self.kind(self.what, where=self.where, fix=self.fix)


def _public(error: KdError) -> type[KdError]:
    """The error's class, or of a plugin's own child the parent that any process can make."""
    return next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)


class Reader(Dataset[Tensor | Failed]):
    """Reads a request; runs in a worker.

    Args:
        images: what is read.
        seed: of the training view.
    """

    def __init__(self, images: Images, seed: int = 0) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, request: Request) -> Tensor | Failed:
        index, epoch = torch.from_numpy(request[0]), request[1]
        try:
            found = self.images.read(index, None if epoch is None else Random(self.seed, index, epoch))
            self._check(found, len(index))
        except KdError as error:
            return Failed(_public(error), error.what, error.where, error.fix)
        # else the memory is taken in a thread that drops the batch where there is none left, and nobody hears of it
        return found if get_worker_info() is None else found.share_memory_()  # type: ignore[no-untyped-call]

    def _check(self, found: Any, count: int) -> None:
        expected = (count, *self.images.shape[1:])
        if not isinstance(found, Tensor) or tuple(found.shape) != expected or found.dtype != torch.uint8:
            told = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            where = f"images {type(self.images).__qualname__}"
            raise PluginError(f"read() gave {told}", where=where, fix=f"It must give a tensor {expected} of uint8.")


def read_batches(reader: Reader, requests: Iterable[Request], workers: int, device: torch.device) -> Iterator[Tensor]:
    """The batches of ``requests``, in order, on ``device``. Closing the iterator ends the workers.

    Args:
        reader: reads one.
        requests: taken ``AHEAD`` times ``workers`` before they are wanted.
        workers: processes; 0 to read in this one, at the time when a batch is wanted.
        device: copies to CUDA are from pinned memory and do not wait.

    Raises:
        DataError: an image cannot be read; from the worker that met it.
    """
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=requests,  # its items are what the reader gets
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        # forked: nothing is pickled, nobody's script is imported again, and no worker touches the device
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_settle,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from the one that dropout draws from
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the workers are in a group of their own
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for found in batches:
        if isinstance(found, Failed):
            raise found.error()
        yield found.to(device, non_blocking=True)


def _settle(worker: int) -> None:
    os.setpgrp()  # signals to a terminal's or scheduler's group reach the driver alone, which ends its workers in order
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # forgets one that came before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the driver ends it


def lost(error: BaseException) -> DeviceError | None:
    """What a person should read if torch's error says that a worker could not go on; None of any other error."""
    if not any(words in str(error) for words in LOST):
        return None
    fix = "In a container give more shared memory (--shm-size); else lower data.workers or data.batch_size."
    return DeviceError(f"a process that read images died: {error}", where="data.workers", fix=fix)


class Feed:
    """Batches by step: reading goes on from the last one, and begins anew where another is asked for.

    Args:
        begin: the batches from a step on.
    """

    def __init__(self, begin: Callable[[int], Iterator[Tensor]]) -> None:
        self._begin = begin
        self._batches: Iterator[Tensor] = iter(())
        self._next = -1

    def at(self, step: int) -> Tensor:
        """The batch of ``step``: [B, C, H, W], on the device."""
        if step != self._next:
            self.close()
            self._batches = self._begin(step)
        found = next(self._batches)
        self._next = step + 1
        return found

    def close(self) -> None:
        """Ends the workers; a later step starts others."""
        self._batches, self._next = iter(()), -1
