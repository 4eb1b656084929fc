"""Locks between processes. They are the operating system's, so a holder that dies, however it dies, lets go at once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import storing

_handles: set[int] = (
    set()
)  # a lock belongs to its open file, which a fork shares: the child must let go of all of these


@contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """An open handle of a lock file, made if it is missing; closing it lets go of the lock."""
    with storing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _handles.add(handle)
    try:
        yield handle
    finally:
        _close(handle)


def try_lock(handle: int) -> bool:
    """Takes the lock unless another holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(handle: int) -> None:
    """Takes the lock; waits for another holder."""
    fcntl.flock(handle, fcntl.LOCK_EX)


@contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """True, and the lock is held in the block, if nobody holds it; makes no file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        yield True
        return
    _handles.add(handle)
    try:
        yield try_lock(handle)
    finally:
        _close(handle)


def _close(handle: int) -> None:
    if handle in _handles:  # not so in a forked child, where the number may mean another file by now
        _handles.remove(handle)
        os.close(handle)


def _let_go() -> None:
    """In a forked child, e.g. a loader process: else it would keep its parent's locks when the parent is killed."""
    for handle in list(_handles):
        _close(handle)


os.register_at_fork(after_in_child=_let_go)
