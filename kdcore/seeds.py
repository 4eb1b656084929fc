"""Seeds: every random number of a run is a function of the run's seed and of what it is for."""

from __future__ import annotations

import hashlib

from .codec import canonical
from .plan import Json


def derive(seed: int, *purpose: Json) -> int:
    """A 63-bit seed for ``purpose``, e.g. ``derive(0, "order", fingerprint, epoch)``; the same on every machine."""
    text = canonical([seed, *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
