"""Folders that appear at once, whole and sealed: every file's sha256 in a manifest, the manifest's own in itself."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__, files
from .codec import canonical
from .errors import StorageError
from .plan import Json
from .reading import open_plain, parse_json, read_plain

FORMAT = 2
MANIFEST = "MANIFEST.json"
_KEYS = {"format", "kdcore", "files", "sha256"}
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
_DAMAGE |= {errno.EINVAL, errno.EFBIG, errno.ENXIO}  # no ordinary file: see reading.py


class DamagedError(StorageError):
    """A folder is not what was committed."""


class FormatError(StorageError):
    """A sound folder of another version of kdcore."""


def commit(parent: Path, name: str, content: Mapping[str, bytes]) -> None:
    """Makes the folder ``parent/name`` with these files and a manifest appear at once, and durably.

    Raises:
        StorageError: names the folder and the bytes that it needs; nothing of it is left.
    """
    temporary = files.temporary_name(parent / name)
    sealed = {**content, MANIFEST: _manifest(content)}
    try:
        with files.storing(parent / name, sum(map(len, sealed.values()))):
            shutil.rmtree(temporary, ignore_errors=True)
            files.make_folder(parent)
            temporary.mkdir()
            for file, data in sealed.items():
                files.write_file(temporary / file, data)
            files.sync(temporary)
            files.rename(temporary, parent / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _manifest(content: Mapping[str, bytes]) -> bytes:
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}
    body: dict[str, Json] = {"format": FORMAT, "kdcore": __version__, "files": entries}
    return json.dumps({**body, "sha256": _seal(body)}, indent=1).encode()


def unsealed(files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """What was committed, of all files of a folder of the same kdcore on another machine.

    Raises:
        DamagedError: they are not what the manifest among them says.
    """
    content = {name: data for name, data in files.items() if name != MANIFEST}
    try:
        whole = parse_json(files.get(MANIFEST, b"")) == parse_json(_manifest(content))
    except ValueError:
        whole = False
    if not whole:
        raise DamagedError("the content is not what was written", where=where)
    return content


def _seal(body: Mapping[str, Json]) -> str:
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def verify(folder: Path) -> None:
    """Checks a folder against its manifest, and the manifest against itself.

    Raises:
        DamagedError: names the first file that is missing, extra or different.
        FormatError: another kdcore made it.
        StorageError: it cannot be read, which says nothing about its content.
    """
    try:
        _compare(folder, _read_manifest(folder)["files"])
    except OSError as error:
        if error.errno in _DAMAGE:
            raise DamagedError(str(error.strerror), where=str(error.filename or folder)) from error
        raise files.storage_error(error, folder, 0) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    data = read_plain(folder / MANIFEST)
    try:
        manifest = parse_json(data)
        seal = manifest["sha256"]
        good = seal == _seal({key: value for key, value in manifest.items() if key != "sha256"})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"unreadable manifest: {error}", where=str(folder)) from error
    if good and manifest.get("format") != FORMAT:
        fix = "Use the kdcore that wrote it, or update."
        text = f"a folder of format {manifest.get('format')}, this kdcore reads {FORMAT}"
        raise FormatError(text, where=str(folder), fix=fix)
    if not good or set(manifest) != _KEYS or not _lists_files(manifest["files"]):
        raise DamagedError("the manifest is not what was written", where=str(folder))
    return dict(manifest)


def _lists_files(entries: Any) -> bool:
    return isinstance(entries, dict) and all(
        isinstance(e, dict) and {"size", "sha256"} <= set(e) for e in entries.values()
    )


def _compare(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if found != set(entries):
        missing, extra = sorted(set(entries) - found), sorted(found - set(entries))
        raise DamagedError(f"missing files: {missing or 'none'}, unknown files: {extra or 'none'}", where=str(folder))
    for name, entry in entries.items():
        with open_plain(folder / name) as file:
            size = os.fstat(file.fileno()).st_size  # first: a file may be made endlessly long for nothing
            if size != entry["size"] or hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise DamagedError("the content is not what was written", where=str(folder / name))
