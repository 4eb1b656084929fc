"""The store: results by content key, checkpoints of unfinished stages, and a lease for each key.

::

    results/<key>/      result.json, <member>.safetensors, MANIFEST.json
    unfinished/<key>/   ckpt-00000123/ (state.json, tensors.safetensors, MANIFEST.json)
    caches/<key>/       view-0-part-00000/ (rows.safetensors, MANIFEST.json): outputs of a frozen member
    leases/<key>        locked while a process trains that key
    runs/<hash>         the folder of a run that uses this store

A folder appears under its name in one rename, after every file in it was fsync'd and its manifest, written last, holds
their sha256. What does not verify is never loaded: it is set aside and reported.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import archive
from .errors import StorageError
from .files import make_folder, remove_folder, rename, replace_file, storing, sync, temporary_name
from .folders import DamagedError, FormatError, commit, unsealed, verify
from .locks import if_free, lock_file, try_lock
from .reading import read_plain, read_table, safetensors_header

KEPT_CHECKPOINTS = 2
LONGEST_PATH = 1 << 16
UNPACK = "unpack"
_KEY = re.compile(r"[0-9a-f]{64}")
_RUBBISH = (".tmp-", "damaged-")
_CHECKPOINT = re.compile(r"ckpt-(\d+)")


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
        if not (folder.is_dir() and self._sound(folder)):
            return None
        with storing(folder):
            try:
                return read_table(folder / "result.json")
            except ValueError as error:  # whoever sealed it, it was not kdcore
                fix = "Remove the folder: the stage is trained again."
                raise StorageError(f"no result: {error}", where=str(folder), fix=fix) from error

    def weights(self, key: str, member: str) -> Path:
        """The safetensors file of a member of a result that :meth:`result` verified."""
        path = self.root / "results" / key / f"{member}.safetensors"
        try:
            safetensors_header(path)
        except (OSError, ValueError) as error:
            text = f"no weights of {member!r}: {error}"
            raise StorageError(text, where=str(path.parent), fix="Remove it and run the stage again.") from error
        return path

    def save_result(self, key: str, files: Mapping[str, bytes]) -> None:
        """Commits a result, then forgets its checkpoints."""
        _commit_once(self.root / "results", key, files)  # an unpack may be faster
        self.forget(key)

    def forget(self, key: str) -> None:
        """Removes the checkpoints of a finished stage; the caller holds its lease."""
        remove_folder(self.root / "unfinished" / key)

    def register(self, run: Path) -> None:
        """Notes a run that uses this store, so that ``gc`` keeps what its journal names, wherever the run lies."""
        path = os.fsencode(run.resolve())
        replace_file(self.root / "runs" / hashlib.sha256(path).hexdigest()[:16], path)

    def runs(self) -> list[Path]:
        """Folders of all runs that use this store and still exist."""
        notes = (self.root / "runs").glob("[0-9a-f]*")
        with storing(self.root / "runs"):
            found = [Path(os.fsdecode(read_plain(note, LONGEST_PATH))) for note in notes]
        return sorted(path for path in found if path.is_dir())

    def stored(self) -> list[str]:
        """Keys of all results, sorted."""
        return [path.name for path in self._names("results") if _KEY.fullmatch(path.name)]

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(self, key: str, step: int, files: Mapping[str, bytes]) -> Path:
        """Commits a checkpoint and drops all but the last two."""
        folder = self.root / "unfinished" / key
        path = folder / f"ckpt-{step:08d}"
        there = path.is_dir()
        if there and not self._sound(path):
            remove_folder(path)
            there = False
        if not there:  # the same step has the same bits
            commit(folder, path.name, files)
        for old in self._checkpoints(key)[:-KEPT_CHECKPOINTS]:
            remove_folder(old)
        return path

    def checkpoint(self, key: str) -> Path | None:
        """The newest checkpoint that verifies; damaged ones are set aside."""
        return next((folder for folder in reversed(self._checkpoints(key)) if self._sound(folder)), None)

    def carried(self, key: str) -> tuple[int, dict[str, bytes]] | None:
        """Step and files of the newest checkpoint, for another store; None if newer ones replace it meanwhile, too."""
        folder = self.checkpoint(key)
        if folder is None:
            return None
        try:
            return int(folder.name.rpartition("-")[2]), {path.name: path.read_bytes() for path in folder.iterdir()}
        except FileNotFoundError:
            return None

    def adopt_checkpoint(self, key: str, step: int, files: Mapping[str, bytes]) -> Path:
        """Commits what :meth:`carried` gave on a machine with the same kdcore.

        Raises:
            StorageError: it was damaged on its way, or there is no room.
        """
        return self.save_checkpoint(key, step, unsealed(files, f"checkpoint of {key[:12]}"))

    def _checkpoints(self, key: str) -> list[Path]:
        """Oldest first; by number, because names of 100 million steps are longer."""
        found = [(_CHECKPOINT.fullmatch(path.name), path) for path in self._names("unfinished", key)]
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    # ------------------------------------------------------------ cached outputs

    def part(self, key: str, name: str) -> Path | None:
        """A part of what is cached under ``key`` if it is there and verifies; a damaged one is set aside."""
        folder = self.root / "caches" / key / name
        return folder if folder.is_dir() and self._sound(folder) else None

    def save_part(self, key: str, name: str, files: Mapping[str, bytes]) -> Path:
        """Commits a part; the lease of ``key`` keeps others from making it too, and ``collect`` from removing it."""
        folder = self.root / "caches" / key
        _commit_once(folder, name, files)
        return folder / name

    # ------------------------------------------------------------ damage

    def _sound(self, folder: Path) -> bool:
        """False for a folder that is not to be used: damaged ones are set aside, those of a newer kdcore stay."""
        try:
            verify(folder)
        except DamagedError as error:
            self._set_aside(folder, error)
            return False
        except FormatError as error:
            self.warn(f"{error} It is left alone and not used.")
            return False
        return True

    def _set_aside(self, folder: Path, error: StorageError) -> None:
        target = folder.with_name(f"damaged-{time.time_ns()}-{folder.name}")
        with storing(folder):
            try:
                rename(folder, target)
            except FileNotFoundError:
                return  # another process set it aside, or cleaned up
        with suppress(StorageError, OSError):  # another process may have set it aside and made it again in between
            verify(target)
            rename(target, folder)
            return
        self.warn(f"{folder} is damaged ({error}); it was set aside and will be made again")

    # ------------------------------------------------------------ leases

    @contextmanager
    def lease(self, key: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """Holds ``key`` for this process; another holder is waited for.

        Args:
            key: a stage's key.
            waiting: told about five times a second who holds the key; may raise to give up.
        """
        path = self.root / "leases" / key
        with storing(path):
            make_folder(path.parent)
        with lock_file(path) as handle:
            while not _locked(handle, path):
                waiting(os.pread(handle, 100, 0).decode(errors="replace"))
                time.sleep(0.2)
            with suppress(OSError):  # for people; a full disk must not stop a run that may need no more room
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()}".encode(), 0)
            yield

    # ------------------------------------------------------------ housekeeping

    def collect(self, keep: set[str], dry: bool = False) -> list[Path]:
        """Removes what no run needs and no process uses; returns it.

        That is: results that are not in ``keep``; checkpoints of other keys and of finished stages; cached outputs,
        which are made again where they are needed; damaged and half-written folders. What belongs to a key whose lease
        is held stays.
        """
        rubbish = []
        for path in self._rubbish(keep):
            with storing(path), if_free(self.root / "leases" / _owner(path)) as free:
                if free and not dry:
                    remove_folder(path)
                if free and (dry or not path.exists()):
                    rubbish.append(path)
        return rubbish

    def _rubbish(self, keep: set[str]) -> Iterator[Path]:
        finished = set(self.stored())
        yield from self._names("caches")
        for part, needed in (("results", keep), ("unfinished", keep - finished)):
            for path in self._names(part):
                if path.name.startswith(_RUBBISH) or (_KEY.fullmatch(path.name) and path.name not in needed):
                    yield path
                elif part == "unfinished" and path.is_dir():
                    yield from (inner for inner in self._names(part, path.name) if inner.name.startswith(_RUBBISH))

    def _names(self, *parts: str) -> list[Path]:
        folder = self.root.joinpath(*parts)
        with storing(folder):
            return sorted(folder.iterdir()) if folder.is_dir() else []

    def pack(self, target: Path, keys: list[str]) -> None:
        """Writes the results of ``keys`` to one tar file."""
        archive.pack(self.root / "results", keys, target)

    def unpack(self, source: Path) -> list[str]:
        """Adds the results of a tar file: all of them, or nothing if one is damaged. Checkpoints of theirs are
        forgotten, unless a process trains the key: then it forgets them at its end.

        Returns:
            The new keys.
        """
        incoming = temporary_name(self.root / "results" / UNPACK)
        with self.lease(UNPACK, lambda holder: None):
            try:
                with storing(incoming):
                    make_folder(incoming)
                keys = archive.extract(source, incoming)
                return [key for key in keys if self._adopt(incoming / key)]
            finally:
                shutil.rmtree(incoming, ignore_errors=True)

    def _adopt(self, folder: Path) -> bool:
        target = self.root / "results" / folder.name
        with storing(target):
            for path in [*folder.iterdir(), folder]:
                sync(path)
            try:
                rename(folder, target)
            except OSError as error:
                if not _is_taken(error):
                    raise
                return False
        unfinished = self.root / "unfinished" / folder.name
        with storing(unfinished), if_free(self.root / "leases" / folder.name) as free:
            if free and unfinished.is_dir():
                remove_folder(unfinished)
        return True


def _commit_once(parent: Path, name: str, files: Mapping[str, bytes]) -> None:
    """Commits a folder unless it is there; another process that is faster does no harm."""
    try:
        if not (parent / name).is_dir():
            commit(parent, name, files)
    except StorageError as error:
        if not _is_taken(error.__cause__):
            raise


def _locked(handle: int, path: Path) -> bool:
    with storing(path):
        return try_lock(handle)


def _is_taken(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)


def _owner(path: Path) -> str:
    """The key whose lease guards a folder: that of ``results/.tmp-1-<key>``, or of all in ``unfinished/<key>``."""
    found = _KEY.search(path.name) or _KEY.search(path.parent.name)
    return found[0] if found else UNPACK
