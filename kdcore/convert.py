"""From a checkpoint of torch to safetensors: the only place where kdcore reads a pickle, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .card import Card, read_header
from .convert_worker import LONGEST, REFUSED
from .errors import StorageError
from .files import appearing, storing, write_file
from .plan import ModelRef
from .registry import Catalog

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What the process that reads a file may use.

    Args:
        seconds: of wall-clock time.
        cpu_seconds: of processor time, once torch is loaded.
        memory: bytes, once torch is loaded.
        output: bytes that it may write.
    """

    seconds: float
    cpu_seconds: int
    memory: int
    output: int

    @classmethod
    def of(cls, size: int) -> Limits:
        """Ample for an honest file of ``size`` bytes: five copies of its tensors, and 10 MiB a second."""
        slow = size // (10 * MIB)
        return cls(120 + slow, 60 + slow, 1024 * MIB + 6 * size, 64 * MIB + 2 * size)


def convert(
    source: Path,
    target: Path,
    *,
    key: str = "",
    card: Card | None = None,
    catalog: Catalog | None = None,
    limits: Limits | None = None,
) -> int:
    """Writes the tensors of a .pth, .pt or .safetensors file to ``target``; returns how many.

    Args:
        source: what somebody saved; nothing in it is trusted.
        target: a file there is replaced at the end.
        key: where in the checkpoint the state dict is; default: its only one.
        card: if given, the tensors must be those of its model, and go into the file with it.
        catalog: where the card's model is found.
        limits: of the process that reads it; default: by the size of the file.

    Raises:
        StorageError: the file is refused, damaged or asks for too much; says why. ``target`` is as it was.
        RecipeError: the tensors are not those of the card's model.
    """
    if not source.is_file():
        raise StorageError("no such file", where=str(source), fix="Give the path of a .pth, .pt or .safetensors file.")
    with appearing(target) as temporary:
        _read(source, temporary, key, limits or Limits.of(source.stat().st_size))
        tensors = len(set(read_header(temporary)) - {"__metadata__"})
        if card is not None:
            assert catalog is not None, "a card's model is found in a catalog"
            _fit(temporary, source, card, catalog)
        return tensors


def _fit(path: Path, source: Path, card: Card, catalog: Catalog) -> None:
    """Replaces the file at ``path`` by the same weights in their model's dtypes and order, with a card."""
    from safetensors.torch import load_file, save

    from .data import DataInfo
    from .training.member import build_model, host_state, put_weights

    ref = ModelRef(card.model, card.options)
    module = build_model(ref, catalog, DataInfo(card.shape, card.classes), seed=0)
    put_weights(module, load_file(path), str(source), f"model {ref}")
    write_file(path, save(host_state(module), card.metadata))


# ---------------------------------------------------------------- the process


def _read(source: Path, target: Path, key: str, limits: Limits) -> None:
    given = (key, limits.cpu_seconds, limits.memory, limits.output)
    program = f"import sys; sys.path[:] = {sys.path!r}; from kdcore.convert_worker import main; main(*{given!r})"
    with storing(source), source.open("rb") as file, target.open("wb") as out, tempfile.TemporaryFile() as said:
        worker = subprocess.Popen(
            [sys.executable, "-I", "-c", program],
            stdin=file,
            stdout=out,
            stderr=said,
            env=_environment(),
            start_new_session=True,
        )
        try:
            code: int | None = worker.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            worker.kill()
            worker.wait()
        if code != 0:
            raise _explained(code, said, source, limits)


def _environment() -> dict[str, str]:
    """What torch needs to be loaded; no secret is inherited."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}


def _explained(code: int | None, said: IO[bytes], source: Path, limits: Limits) -> StorageError:
    said.seek(0)
    text = "".join(c for c in said.read(MIB).decode(errors="replace").strip() if c.isprintable() or c == "\n")
    last = text.rpartition("\n")[2]
    if code == REFUSED:
        with suppress(ValueError, TypeError, KeyError):  # what a process says that ran a stranger's code is not trusted
            answer = json.loads(last)
            return StorageError(str(answer["what"]), where=str(source), fix=str(answer["fix"]))
    if code is None:
        what = f"reading it took more than {limits.seconds:g} seconds"
    elif code == -signal.SIGXCPU:
        what = f"reading it took more than {limits.cpu_seconds} seconds of processor time"
    elif code < 0:
        what = f"the process that read it was ended by {signal.Signals(-code).name}"
    else:
        what = f"the process that read it failed: {last[:LONGEST]}"
    return StorageError(what, where=str(source), fix="Nothing was written. An honest file of this size takes less.")
