"""The global random generators: kdcore draws from none of them, and a run must not be seen in them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Gives back the state of Python's, numpy's and torch's generators, CUDA's where that was started before.

    Plugins may draw from them, even seed them. About 80 microseconds, most of them numpy's.
    """
    import numpy
    import torch

    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else ()
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
