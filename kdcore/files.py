"""Durable changes: the only ways in which kdcore changes a file or folder that it will read again."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageError


@contextmanager
def storing(path: Path, size: int = 0) -> Iterator[None]:
    """Errors of the operating system leave the block as :class:`StorageError`.

    Args:
        path: what the person who reads the error knows: the final name, not a temporary one.
        size: bytes that were to be written, 0 if that does not matter.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, size) from error


def storage_error(error: OSError, path: Path, size: int) -> StorageError:
    """The readable form of an operating-system error at ``path``."""
    need = f" ({size:,} bytes needed)" if size else ""
    return StorageError(
        f"{error.strerror or error}{need}", where=str(path), fix="Make room or mend it, then run again."
    )


def write_file(path: Path, data: bytes) -> None:
    """Writes and fsyncs a new file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Renames within a file system and makes the new name durable."""
    os.rename(old, new)
    sync(new.parent)


def sync(path: Path) -> None:
    """Makes the content of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents durably: what is committed in it cannot vanish with its name in a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def temporary_name(path: Path) -> Path:
    """The name beside ``path`` under which one thread (of all processes on this machine) prepares or removes it."""
    return path.with_name(f".tmp-{threading.get_native_id()}-{path.name}")


def remove_folder(path: Path) -> None:
    """Removes a folder as far as possible; its name goes at once, so that a kill leaves no half folder under it."""
    doomed = path
    if not path.name.startswith(".tmp-"):
        doomed = temporary_name(path)
        try:
            os.rename(path, doomed)
        except OSError:
            return  # gone already, or not ours to remove
    shutil.rmtree(doomed, ignore_errors=True)


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file: a reader sees the old content or the new, never a part.

    Raises:
        StorageError: names the path and the bytes that were needed, e.g. when the disk is full.
    """
    temporary = temporary_name(path)
    try:
        with storing(path, len(data)):
            make_folder(path.parent)
            write_file(temporary, data)
            rename(temporary, path)
    except BaseException:
        with storing(path):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for others to write to; the file takes its place, durably, when the block ends well.

    Raises:
        StorageError: it cannot be written. ``path`` is as it was then, as after any other error.
    """
    temporary = temporary_name(path)
    try:
        with storing(path):
            make_folder(path.parent)
            yield temporary
            sync(temporary)
            rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
