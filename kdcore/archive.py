"""Results as one tar file, to carry them to another store."""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

from .codec import canonical
from .errors import StorageError
from .files import rename, storage_error, storing, sync, temporary_name
from .folders import FORMAT, verify
from .reading import MOST, open_plain, parse_json

INDEX = "INDEX.json"  # comes first; a tar that is cut between two results is told by it, not by tarfile
_MEMBER = re.compile(r"([0-9a-f]{64})(/[^/\\]+)?")
# tarfile follows a chain of long names by recursion
_NO_PACK = (StorageError, tarfile.TarError, ValueError, KeyError, TypeError, EOFError, RecursionError)


def pack(results: Path, keys: list[str], target: Path) -> None:
    """Writes the folders ``results/<key>`` to the tar file ``target``.

    Raises:
        StorageError: one of them is damaged, or there is no room; ``target`` is as it was.
    """
    temporary = temporary_name(target)
    try:
        with storing(target):
            with tarfile.open(temporary, "w") as tar:
                _write_index(tar, keys)
                for key in keys:
                    verify(results / key)
                    tar.add(results / key, arcname=key)
            sync(temporary)
            rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_index(tar: tarfile.TarFile, keys: list[str]) -> None:
    data = canonical({"format": FORMAT, "keys": sorted(keys)}).encode()
    entry = tarfile.TarInfo(INDEX)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def extract(source: Path, target: Path) -> list[str]:
    """Extracts what :func:`pack` wrote into a new folder and verifies it; returns the keys, sorted.

    Raises:
        StorageError: it is cut or damaged, or holds anything that pack does not write: links, devices, other paths.
    """
    try:
        with open_plain(source) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            keys, members = _read_index(tar, os.fstat(file.fileno()).st_size)
            tar.extractall(target, members=members, filter="data")
        for key in keys:
            verify(target / key)
        return keys
    except OSError as error:
        raise storage_error(error, Path(error.filename or target), 0) from error
    except _NO_PACK as error:
        what = error.what if isinstance(error, StorageError) else str(error)
        fix = "Make it again with kdcore store pack."
        raise StorageError(f"not a whole pack: {what}", where=str(source), fix=fix) from error


def _read_index(tar: tarfile.TarFile, size: int) -> tuple[list[str], list[tarfile.TarInfo]]:
    try:
        members = [_in_bounds(member, size) for member in tar]
    except OSError as error:  # it points beyond what any file can hold
        raise ValueError(str(error)) from error
    file = tar.extractfile(members[0]) if members and members[0].name == INDEX else None
    if file is None:
        raise ValueError(f"it does not begin with {INDEX}")
    index = parse_json(file.read(MOST))
    if index["format"] != FORMAT:
        raise ValueError(f"format {index['format']}, this kdcore reads {FORMAT}")
    found = {_key(member) for member in members[1:]}
    if found != set(index["keys"]):
        raise ValueError(f"it should hold {len(index['keys'])} results and holds {len(found)}")
    return sorted(found), members[1:]


def _in_bounds(member: tarfile.TarInfo, size: int) -> tarfile.TarInfo:
    """The member, before a byte is written and before the next header is read.

    A header may promise more than there is, holes that fill a disk, or a negative size, which leads tarfile back to the
    same header for ever.
    """
    if member.issparse() or member.size < 0 or member.offset_data + member.size > size:
        raise ValueError(f"{member.name!r} claims {member.size:,} bytes that are not there")
    return member


def _key(member: tarfile.TarInfo) -> str:
    match = _MEMBER.fullmatch(member.name)
    if match is None or match[2] in ("/.", "/..") or not (member.isreg() if match[2] else member.isdir()):
        raise ValueError(f"{member.name!r} does not belong in a pack")
    return match[1]
