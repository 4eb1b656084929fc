"""Durable writes: the only three ways in which kdcore changes a file that it will read again."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import StorageError


def write_file(path: Path, data: bytes) -> None:
    """Writes and fsyncs a new file.

    Raises:
        StorageError: names the path and the bytes that were needed, e.g. when the disk is full.
    """
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(error, path, len(data)) from error


def rename(old: Path, new: Path) -> None:
    """Renames within a file system and makes the new name durable."""
    try:
        os.rename(old, new)
        sync_folder(new.parent)
    except OSError as error:
        raise storage_error(error, new, 0) from error


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write_file(temporary, data)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def storage_error(error: OSError, path: Path, size: int) -> StorageError:
    """The readable form of an operating-system error at ``path``."""
    need = f" ({size:,} bytes needed)" if size else ""
    return StorageError(
        f"{error.strerror or error}{need}", where=str(path), fix="Make room or mend it, then run again."
    )
