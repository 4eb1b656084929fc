"""The store: results by content key, checkpoints of unfinished stages, and a lease for each key.

::

    results/<key>/      result.json, <member>.safetensors, MANIFEST.json
    work/<key>/         ckpt-00000123/ (state.json, tensors.safetensors, MANIFEST.json)
    leases/<key>        locked while a process trains that key

A folder appears under its name in one rename, after every file in it was fsync'd and its manifest, written last, holds
their sha256. What does not verify is never loaded: it is set aside and reported.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import __version__
from .errors import StorageError
from .files import rename, storage_error, sync_folder, write_file
from .plan import Json, canonical

FORMAT = 1
MANIFEST = "MANIFEST.json"
KEPT_CHECKPOINTS = 2
_KEY = re.compile(r"[0-9a-f]{64}")


class Store:
    """A folder of results that several runs may share.

    Args:
        root: the folder; made when something is written.
        warn: told of damaged folders that were set aside.
    """

    def __init__(self, root: str | Path, warn: Callable[[str], None] = lambda text: None) -> None:
        self.root, self.warn = Path(root), warn

    # ------------------------------------------------------------ results

    def result(self, key: str) -> dict[str, Any] | None:
        """The verified result of ``key``; None if there is none, or if it is damaged (then it is set aside)."""
        folder = self.root / "results" / key
        if not folder.is_dir():
            return None
        try:
            verify(folder)
            return dict(json.loads((folder / "result.json").read_bytes()))
        except (StorageError, OSError, ValueError) as error:
            self._set_aside(folder, error)
            return None

    def weights(self, key: str, member: str) -> Path:
        """The safetensors file of a member of a result that :meth:`result` verified."""
        path = self.root / "results" / key / f"{member}.safetensors"
        if not path.is_file():
            raise StorageError(f"no weights of {member!r}", where=str(path.parent), fix="Run the stage again.")
        return path

    def save_result(self, key: str, files: Mapping[str, bytes]) -> None:
        """Commits a result, then forgets its checkpoints."""
        if not (self.root / "results" / key).is_dir():
            commit(self.root / "results", key, files)
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    def keys(self) -> list[str]:
        """Keys of all results, sorted."""
        folder = self.root / "results"
        return sorted(p.name for p in folder.iterdir() if _KEY.fullmatch(p.name)) if folder.is_dir() else []

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(self, key: str, step: int, files: Mapping[str, bytes]) -> Path:
        """Commits a checkpoint and drops all but the last two."""
        folder = self.root / "work" / key
        name = f"ckpt-{step:08d}"
        shutil.rmtree(folder / name, ignore_errors=True)
        commit(folder, name, files)
        for old in self._checkpoints(key)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)
        return folder / name

    def checkpoint(self, key: str) -> Path | None:
        """The newest checkpoint that verifies; damaged ones are set aside."""
        for folder in reversed(self._checkpoints(key)):
            try:
                verify(folder)
                return folder
            except (StorageError, OSError) as error:
                self._set_aside(folder, error)
        return None

    def _checkpoints(self, key: str) -> list[Path]:
        folder = self.root / "work" / key
        return sorted(folder.glob("ckpt-*")) if folder.is_dir() else []

    def _set_aside(self, folder: Path, error: Exception) -> None:
        target = folder.with_name(f"damaged-{time.time_ns()}-{folder.name}")
        self.warn(f"{folder} is damaged ({error}); it was set aside and will be made again")
        rename(folder, target)

    # ------------------------------------------------------------ leases

    @contextmanager
    def lease(self, key: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """Holds ``key`` for this process; another holder is waited for.

        The lock is the operating system's, so a holder that dies, however it dies, lets go at once.

        Args:
            key: a stage's key.
            waiting: called about five times a second while another process holds the key; may raise to give up.
        """
        path = self.root / "leases" / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise storage_error(error, path, 0) from error
        try:
            while not _try_lock(handle):
                waiting(os.pread(handle, 100, 0).decode(errors="replace"))
                time.sleep(0.2)
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()}".encode(), 0)
            yield
        finally:
            os.close(handle)

    # ------------------------------------------------------------ housekeeping

    def collect(self, keep: set[str], dry: bool = False) -> list[Path]:
        """Removes results that are not in ``keep``, their checkpoints, damaged and half-written folders."""
        rubbish = [self.root / "results" / key for key in self.keys() if key not in keep]
        for part in ("results", "work"):
            folder = self.root / part
            names = sorted(folder.iterdir()) if folder.is_dir() else []
            rubbish += [p for p in names if p.name.startswith((".tmp-", "damaged-")) or (part == "work" and self._idle(p))]
        for path in [] if dry else rubbish:
            shutil.rmtree(path, ignore_errors=True)
        return rubbish

    def _idle(self, work: Path) -> bool:
        try:
            handle = os.open(self.root / "leases" / work.name, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            return _try_lock(handle)
        finally:
            os.close(handle)

    def pack(self, target: Path, keys: list[str]) -> None:
        """Writes the results of ``keys`` to one tar file."""
        temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
        try:
            with tarfile.open(temporary, "w") as tar:
                for key in keys:
                    verify(self.root / "results" / key)
                    tar.add(self.root / "results" / key, arcname=key)
            rename(temporary, target)
        except OSError as error:
            raise storage_error(error, target, 0) from error
        finally:
            temporary.unlink(missing_ok=True)

    def unpack(self, source: Path) -> list[str]:
        """Adds the results of a tar file; each is verified before it counts. Returns the new keys."""
        incoming = self.root / "results" / f".tmp-{os.getpid()}-unpack"
        try:
            incoming.mkdir(parents=True)
            with tarfile.open(source) as tar:
                tar.extractall(incoming, filter="data")
            return [key for key in sorted(os.listdir(incoming)) if self._adopt(incoming / key)]
        except (OSError, tarfile.TarError) as error:
            raise StorageError(str(error), where=str(source)) from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _adopt(self, folder: Path) -> bool:
        target = self.root / "results" / folder.name
        if not _KEY.fullmatch(folder.name) or target.exists():
            return False
        verify(folder)
        rename(folder, target)
        return True


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def commit(parent: Path, name: str, files: Mapping[str, bytes]) -> None:
    """Makes the folder ``parent/name`` with ``files`` and a manifest appear at once, and durably."""
    temporary = parent / f".tmp-{os.getpid()}-{name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file, data in files.items():
            write_file(temporary / file, data)
        write_file(temporary / MANIFEST, _manifest(files))
        sync_folder(temporary)
        rename(temporary, parent / name)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise storage_error(error, temporary, sum(map(len, files.values()))) from error
        raise


def _manifest(files: Mapping[str, bytes]) -> bytes:
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    body: dict[str, Json] = {"format": FORMAT, "kdcore": __version__, "files": entries}
    return json.dumps({**body, "sha256": _seal(body)}, indent=1).encode()


def _seal(body: Mapping[str, Json]) -> str:
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def verify(folder: Path) -> None:
    """Checks a folder against its manifest, and the manifest against itself.

    Raises:
        StorageError: names the first file that is missing, extra or different.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        body = {key: manifest[key] for key in ("format", "kdcore", "files")}
        good = set(manifest) == {*body, "sha256"} and manifest["sha256"] == _seal(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"unreadable manifest: {error}", where=str(folder)) from error
    if not good:
        raise StorageError("the manifest is damaged", where=str(folder))
    if body["format"] != FORMAT:
        raise StorageError(f"format {body['format']}, this kdcore reads {FORMAT}", where=str(folder))
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if found != set(body["files"]):
        raise StorageError(f"files {sorted(found)} are not those of the manifest", where=str(folder))
    for name, entry in body["files"].items():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise StorageError("the content is not what was written", where=str(folder / name))
