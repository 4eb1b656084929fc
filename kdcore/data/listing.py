"""The images in a folder of classes: their paths in one order on every machine, and a fingerprint of what they hold.

The fingerprint is of names, sizes and contents, so a copy of a data set has the same one and an edited file another.
Reading everything takes minutes for a hundred gigabytes, so it is done once: each class's digest is kept in the user's
cache folder under the names, sizes and times of change of its files. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..codec import digest
from ..errors import DataError, StorageError
from ..files import replace_file
from ..reading import open_plain, read_table

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"))
THREADS = 8  # a network's disk answers several at once; sha256 lets other threads run
LAYOUT = "Give a folder with a folder for each class, as in train/cat/1.jpg."


@dataclass(frozen=True)
class Files:
    """The images of one class.

    Args:
        names: paths relative to the split's folder, in order, each with a zero byte after it.
        count: how many.
        quick: sha256 of names, sizes and times of change.
        content: sha256 of names, sizes and contents; of names and sizes where contents are taken on trust.
    """

    names: bytes
    count: int
    quick: str
    content: str


def class_names(folder: Path) -> list[str]:
    """The folders in ``folder`` in order, without hidden ones.

    Raises:
        DataError: there is none.
    """
    with _reading(folder):
        names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError("no class folders", where=str(folder), fix=LAYOUT)
    return names


def list_classes(folder: Path, names: list[str], verify: bool) -> list[Files]:
    """The images of these classes. Files count by their suffix; hidden ones do not, links do.

    Args:
        folder: of the split.
        names: of the classes.
        verify: read the contents of what was not read before; else names and sizes stand for them.

    Raises:
        DataError: a file or folder cannot be read.
    """
    store = _cache_file(folder) if verify else None
    known = {} if store is None else _known(store)
    with _reading(folder), ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: _files(folder, name, verify, known), names))
    now = {files.quick: files.content for files in found}
    if store is not None and now != known:
        with suppress(StorageError):  # then they are read again the next time
            replace_file(store, json.dumps(now).encode())
    return found


def _files(folder: Path, name: str, verify: bool, known: Mapping[str, str]) -> Files:
    found = _scan(folder, name)
    names = b"".join(os.fsencode(path) + b"\0" for path, _, _ in found)
    sizes = [size for _, size, _ in found]
    quick = _digest(names, sizes, [changed for _, _, changed in found])
    if not verify:
        return Files(names, len(found), quick, _digest(names, sizes))
    return Files(names, len(found), quick, known.get(quick) or _content(folder, names, sizes))


def _scan(folder: Path, name: str) -> list[tuple[str, int, int]]:
    """Path relative to ``folder``, size and time of change in ns of every image of a class, by path."""
    found, todo, seen = [], [name], set()
    while todo:
        here = todo.pop()
        with os.scandir(folder / here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):  # of two links to a folder the first one counts
                if entry.name.startswith("."):
                    continue
                path = f"{here}/{entry.name}"
                if entry.is_dir():
                    about = entry.stat()
                    if (about.st_dev, about.st_ino) not in seen:  # a link may lead back to where it is
                        seen.add((about.st_dev, about.st_ino))
                        todo.append(path)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    about = entry.stat()
                    if stat.S_ISREG(about.st_mode):
                        found.append((path, about.st_size, about.st_mtime_ns))
    return sorted(found)


def _content(folder: Path, names: bytes, sizes: list[int]) -> str:
    total = hashlib.sha256(_digest(names, sizes).encode())
    for name in names.split(b"\0")[:-1]:
        with open_plain(folder / os.fsdecode(name)) as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _digest(names: bytes, *numbers: list[int]) -> str:
    return digest([hashlib.sha256(names).hexdigest(), *numbers])


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = str(error.filename or folder)
        raise DataError(
            error.strerror or str(error), where=where, fix="Correct data.root, or mend the file."
        ) from error


# ---------------------------------------------------------------- digests that are known


def _cache_file(folder: Path) -> Path | None:
    """Where the digests of a folder lie; None for somebody without a home."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return home / "kdcore" / "folders" / f"{name[:32]}.json"


def _known(path: Path) -> dict[str, str]:
    """Contents by the quick digests; nothing where the file is not there or is not one of ours."""
    try:
        return {str(quick): str(content) for quick, content in read_table(path).items()}
    except (OSError, ValueError):
        return {}
