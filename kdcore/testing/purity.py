"""What a function of its arguments leaves alone, and what it does not look at."""

from __future__ import annotations

import datetime
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from .subject import Subject, require

SHIFT = 400 * 86_400 + 12_345.678
"""Seconds by which a shifted clock goes before: another year, month, weekday, hour and second."""


@contextmanager
def no_random_numbers() -> Iterator[None]:
    """Fails if the block draws from a global generator of Python, numpy or torch; their states are put back."""
    before = _random_states()
    try:
        yield
        for name, (state, same, _) in before.items():
            now = _random_states()[name][0]
            fix = "Derive what you need with kdcore.derive(seed, ...), which has no state."
            require(same(state, now), f"it draws from {name}'s global generator", fix)
    finally:
        for state, _, restore in before.values():
            restore(state)


@contextmanager
def other_random_state() -> Iterator[None]:
    """Global generators in another state than outside of the block; put back after it."""
    before = _random_states()
    try:
        for name in before:
            _draw(name)
        yield
    finally:
        for state, _, restore in before.values():
            restore(state)


def _draw(name: str) -> None:
    draws: dict[str, Callable[[Any], Any]] = {
        "random": lambda module: module.random(),
        "numpy": lambda module: module.random.rand(),
        "torch": lambda module: module.rand(()),
    }
    draws[name](sys.modules[name])


def _random_states() -> dict[str, tuple[Any, Callable[[Any, Any], bool], Callable[[Any], None]]]:
    """State, comparison and restoring of every generator whose library was imported."""
    found: dict[str, Any] = {"random": (random.getstate(), lambda a, b: a == b, random.setstate)}
    if numpy := sys.modules.get("numpy"):
        found["numpy"] = (numpy.random.get_state(), _same_in_numpy, numpy.random.set_state)
    if torch := sys.modules.get("torch"):
        found["torch"] = (torch.get_rng_state(), torch.equal, torch.set_rng_state)
    return found


def _same_in_numpy(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[2:] == other[2:] and bool((one[1] == other[1]).all())  # position and keys of the Mersenne twister


@contextmanager
def shifted_clock(target: Any) -> Iterator[None]:
    """Another time of day in ``time``, ``datetime`` and the names that the target's module imported from them."""
    others = {id(real): other for real, other in _later()}
    modules = [time, datetime, sys.modules.get(getattr(target, "__module__", None) or "")]
    with ExitStack() as stack:
        for module in filter(None, modules):
            for name, value in list(vars(module).items()):
                if id(value) in others:
                    stack.enter_context(patch.object(module, name, others[id(value)]))
        yield


def _later() -> Iterator[tuple[Any, Any]]:
    """(real, shifted) of everything that tells the time."""
    for name in ("time", "monotonic", "perf_counter", "process_time"):
        real, in_ns = getattr(time, name), getattr(time, f"{name}_ns")
        yield real, _added(real, SHIFT)
        yield in_ns, _added(in_ns, int(SHIFT * 1e9))
    now, local, strftime = _added(time.time, SHIFT), time.localtime, time.strftime
    for real in (local, time.gmtime, time.ctime):
        yield real, _at(real, now)
    yield strftime, lambda text, when=None: strftime(text, local(now()) if when is None else when)
    for cls in (datetime.datetime, datetime.date):
        yield cls, _later_class(cls, now)


def _added(real: Callable[[], float], shift: float) -> Callable[[], float]:
    return lambda: real() + shift


def _at(real: Callable[[float], Any], now: Callable[[], float]) -> Callable[..., Any]:
    return lambda seconds=None: real(now() if seconds is None else seconds)


def _later_class(real: Any, now: Callable[[], float]) -> Any:
    today = classmethod(lambda cls, tz=None: real.fromtimestamp(now(), *([tz] if tz else [])))
    return type(real.__name__, (real,), {"now": today, "today": today, "utcnow": today})


@contextmanager
def process_left_alone(target: Any) -> Iterator[None]:
    """Fails if the block changes the working folder, an environment variable or an attribute of the class."""
    folder, environ, own = os.getcwd(), dict(os.environ), _attributes(target)
    try:
        yield
        fix = "A process runs many stages: keep what you need in the instance."
        require(os.getcwd() == folder, f"it moves the process to {os.getcwd()}", fix)
        changed = sorted(k for k in environ.keys() | os.environ.keys() if environ.get(k) != os.environ.get(k))
        require(not changed, f"it changes the environment variable {', '.join(changed)}", fix)
        now = _attributes(target)
        changed = sorted(k for k in own.keys() | now.keys() if own.get(k) != now.get(k))
        require(not changed, f"it changes the class attribute {', '.join(changed)}", fix)
    finally:
        os.chdir(folder)
        for name in os.environ.keys() - environ.keys():
            del os.environ[name]
        os.environ.update(environ)


def _attributes(target: Any) -> dict[str, tuple[int, str]]:
    """Identity of every attribute of a class and its bases, and the content of those that hold values."""
    held = (list, dict, set, bytearray)
    return {
        f"{cls.__name__}.{name}": (id(value), repr(value) if isinstance(value, held) else "")
        for cls in getattr(target, "__mro__", ())
        for name, value in vars(cls).items()
        if not name.startswith("__")  # Python itself adds some when they are first asked for
    }


def options_survive_json(subject: Subject) -> None:
    """Fails unless the options are JSON from which the same options are read back."""
    import json

    options = subject.example()
    try:
        text = json.dumps(options.model_dump(mode="json"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"its options are not JSON: {error}. Use numbers, strings, lists and tables.") from None
    again = type(options)(**json.loads(text))
    fix = "A stage holds its options as JSON: give each field a type that reads back what it writes."
    require(again == options, f"its options {options!r} come back from JSON as {again!r}", fix)
