"""Device, precision and threads of a stage."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator

import torch

from ..errors import DeviceError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
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


def make_current(device: torch.device) -> None:
    """What asks for "cuda" without a number gets this device from now on."""
    torch.cuda.set_device(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors may take on a GPU, with what torch holds there unused; None on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def watched_memory(device: torch.device) -> Callable[[], int]:
    """Gives, whenever it is called, the most bytes that new tensors took on a GPU since now; 0 on a CPU."""
    if device.type != "cuda":
        return lambda: 0
    torch.cuda.init()  # type: ignore[no-untyped-call]  # there are no statistics before
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return lambda: torch.cuda.max_memory_allocated(device) - before


def default_threads(jobs: int) -> int:
    """Cores of this process shared by ``jobs``."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def default_workers(jobs: int) -> int:
    """Processes that read images for each of ``jobs``: as many as it has cores, since decoding is all that they do."""
    return min(MOST_WORKERS, default_threads(jobs))


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, malloc gives no large block back to the system. glibc does that with every batch's tensors: their pages
    fault again at each step, a tenth of a small student's time. At the end all that is free goes back, and blocks are
    mapped from the size on at which glibc's own rule ends, which a setting turns off for good.
    """
    libc = ctypes.CDLL(None)
    own = any(name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES") for name in os.environ)
    if not hasattr(libc, "mallopt") or own:
        yield  # no glibc, another malloc, or somebody's own setting
        return
    try:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)


@contextlib.contextmanager
def sandbox(device: torch.device, threads: int) -> Iterator[None]:
    """Fixes threads and deterministic convolutions inside, and gives back the caller's, random state included."""
    before = torch.get_num_threads()
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(benchmark=False, deterministic=True),
        kept_memory() if device.type == "cpu" else contextlib.nullcontext(),
    ):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16 or float16, or nothing."""
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "float32")


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seeds the generators that dropout draws from on this device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
