"""Device, precision and threads of a stage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ..errors import DeviceError

MOST_WORKERS = 32  # each holds some batches


def resolve(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        DeviceError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise DeviceError(f"{name!r} is not there ({found} CUDA devices)", where="device", fix='Write "auto".')
    return torch.device(name)


def default_threads(jobs: int) -> int:
    """Cores of this process shared by ``jobs``."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def default_workers(jobs: int) -> int:
    """Processes that read images for each of ``jobs``: as many as it has cores, since decoding is all that they do."""
    return min(MOST_WORKERS, default_threads(jobs))


@contextlib.contextmanager
def sandbox(device: torch.device, threads: int) -> Iterator[None]:
    """Fixes threads and deterministic convolutions inside, and gives back the caller's, random state included."""
    before = torch.get_num_threads()
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(benchmark=False, deterministic=True),
    ):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seeds the generators that dropout draws from on this device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
