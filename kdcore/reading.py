"""Reads files that may be anything: cut, endless, a pipe, or made to do harm. Nothing here waits, executes or overruns.

Errors are OSError and ValueError; callers say in words what the file should have been.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

MOST = 1 << 26
"""Bytes of the largest text that is read whole: parsed, it may take thirty times as much memory."""
MOST_HEADER = 1 << 22
"""Bytes of the largest header of a safetensors file; 30,000 tensors need 3 MB."""


@contextmanager
def open_plain(path: Path) -> Iterator[BufferedReader]:
    """An ordinary file, opened for reading.

    Raises:
        OSError: it is a folder, or a pipe or device, which could be endless; or it cannot be opened.
    """
    with open(path, "rb", opener=_open) as file:
        yield file


def _open(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK)  # else the open of a pipe waits for a writer
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "Not an ordinary file", path)


def read_plain(path: Path, most: int = MOST) -> bytes:
    """The content of an ordinary file.

    Raises:
        OSError: as :func:`open_plain`, or it has more than ``most`` bytes.
    """
    with open_plain(path) as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return data


def parse_json(data: bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is not JSON, nested deeply, names a key twice, or holds a number that is not finite.
    """
    try:
        return json.loads(data, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def read_table(path: Path, most: int = MOST) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: as :func:`read_plain`.
        ValueError: as :func:`parse_json`, or it is another JSON value.
    """
    found = parse_json(read_plain(path, most))
    if not isinstance(found, dict):
        raise ValueError(f"not a JSON object but a {type(found).__name__}")
    return found


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> dtype, shape and offsets, and ``__metadata__``; reads no tensor.

    Raises:
        OSError: as :func:`open_plain`.
        ValueError: it is not one.
    """
    with open_plain(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(MOST_HEADER, os.fstat(file.fileno()).st_size - 8):
            raise ValueError("it does not begin with the size of a header")
        header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header
