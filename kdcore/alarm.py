"""A limit on how long code of others may take."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RecipeError

VARIABLE = "KDCORE_PLUGIN_SECONDS"
DEFAULT = 60.0


class HangError(BaseException):
    """The block took too long. No ``Exception``: what hangs may well be within ``try: ... except Exception``."""


def patience() -> float:
    """Seconds that a plugin may take to load.

    Raises:
        RecipeError: the environment variable is not a number above 0.
    """
    text = os.environ.get(VARIABLE, str(DEFAULT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise RecipeError(f"{text!r} is no number of seconds above 0", where=VARIABLE, fix=f"Write {DEFAULT:g}.")
    return seconds


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises :class:`HangError` in the block after so many seconds, and every second from then on.

    It is SIGALRM, whose former handler and timer come back afterwards: nothing happens outside of the main thread, and
    a call into C that does not return to Python is not ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    over = False

    def ring(number: int, frame: object) -> None:
        if over:  # it rang while the former handler was put back, which has to be done to its end
            return
        raise HangError(f"not loaded after {seconds:g} s; {VARIABLE} sets another limit")

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 1e-3), interval)
