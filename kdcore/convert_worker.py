"""Reads a checkpoint of torch in a process of its own: standard input is the file, standard output safetensors.

Nothing that the file holds runs: torch.load(weights_only=True) makes tensors and containers alone. Should that fail one
day, this process has little to give away: no environment, no network where the system lets it give that up, and limits
on time, memory and what it writes. What it refuses it says on standard error, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

REFUSED = 3  # exit code: standard error says why
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # of unshare(2)
COUNTER = "n_averaged"  # of torch's AveragedModel, beside its module
LONGEST = 300  # characters of a file's own words in a message
TRUSTED = "If you trust the file: load it in Python and torch.save(model.state_dict(), ...)."
AGAIN = "Get it again; kdcore reads what torch.save wrote of a state dict, and safetensors."
_OBJECT = re.compile(r"GLOBAL ([\w.]+)")


class Refused(Exception):  # noqa: N818 - it is an answer
    """Why a file is not converted, and what to do."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def main(key: str, cpu_seconds: int, memory: int, output: int) -> None:
    """Converts standard input; processor time and memory (bytes) count beyond what loading torch takes."""
    import safetensors.torch
    import torch

    torch.set_num_threads(1)
    leave_network()
    _limit(cpu_seconds, memory, output)
    try:
        data = safetensors.torch.save(clean(find(read(sys.stdin.buffer), key)))
        with open(1, "wb", closefd=False) as file:
            file.write(data)
    except Refused as refused:
        _refuse(refused.what, refused.fix)
    except OSError as error:
        _refuse(f"its tensors cannot be written: {error.strerror}")
    except BaseException as error:  # safetensors panics where a copy of its bytes finds no room
        if not _is_memory(error):
            raise
        _refuse(f"its tensors take more than {memory / 2**20:,.0f} MiB, many times what the file has")


def leave_network() -> bool:
    """Moves this process to a network without interfaces; False where the system does not let it."""
    return bool(ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK) == 0)


def _limit(cpu_seconds: int, memory: int, output: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    last = int(time.process_time()) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (last, last + 1))  # SIGXCPU comes before SIGKILL, and tells why
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output, output))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _refuse(what: str, fix: str = "") -> None:
    print(json.dumps({"what": what, "fix": fix}), file=sys.stderr, flush=True)
    os._exit(REFUSED)


def _is_memory(error: BaseException) -> bool:
    words = ("allocate memory", "bad_alloc", "PyObject pointer is null")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


# ---------------------------------------------------------------- reading


def read(file: BinaryIO) -> Any:
    """What a .pth, .pt or .safetensors file holds.

    Raises:
        Refused: it is a file of another kind, is damaged, or holds objects.
    """
    import safetensors.torch
    import torch

    head = file.read(9)
    file.seek(0)
    with _readable():
        if head[8:] == b"{":
            return safetensors.torch.load(file.read())
        if head.startswith(b"PK"):
            _check_archive(file)
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(file: BinaryIO) -> None:
    names = {name.partition("/")[2] for name in zipfile.ZipFile(file).namelist()}
    file.seek(0)
    if "constants.pkl" in names:
        fix = "Load it with torch.jit.load and torch.save its state_dict()."
        raise Refused("it is a TorchScript archive: a program, not weights", fix)
    if "archive_format" in names:
        fix = "Load it with torch.export.load and torch.save the state_dict of its module()."
        raise Refused("it is a program of torch.export, not weights", fix)


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever a reader raises says why this file is refused; lack of memory is told by the caller."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if _is_memory(error):
            raise
        if found := _OBJECT.search(str(error)):
            raise Refused(f"it holds more than tensors: {found[1]}", TRUSTED) from error
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0][:LONGEST]
        raise Refused(f"it is damaged, or no checkpoint of torch ({type(error).__name__}: {text})", AGAIN) from error


# ---------------------------------------------------------------- the state dict


def find(data: Any, key: str) -> Mapping[Any, Any]:
    """The state dict in a checkpoint: under ``key``, else the one mapping of names to tensors in it, else itself."""
    if not isinstance(data, Mapping):
        raise Refused(f"it holds {type(data).__name__}, not a state dict", "Save model.state_dict().")
    if key:
        if not isinstance(data.get(key), Mapping):
            raise Refused(f"it has no state dict under {key!r}", f"It has: {_listed(data)}.")
        return dict(data[key])
    inside = [name for name, value in data.items() if isinstance(value, Mapping) and value and _all_tensors(value)]
    if len(inside) > 1:
        raise Refused(f"it holds {len(inside)} state dicts: {_listed(inside)}", f"Choose one: --key {inside[0]}")
    return dict(data[inside[0]]) if inside else data


def _all_tensors(values: Mapping[Any, Any]) -> bool:
    import torch

    return all(isinstance(value, torch.Tensor) for value in values.values())


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)[:LONGEST]


def clean(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors on the host that share no memory, under their names without what torch's wrappers put before them.

    Raises:
        Refused: one is no plain tensor, or two would have one name.
    """
    import torch

    for name, value in state.items():
        if not isinstance(name, str) or name.endswith("__metadata__"):  # which safetensors takes for its own
            raise Refused(f"{name!r:.{LONGEST}} is no name of a tensor", "Save it under another.")
        if not isinstance(value, torch.Tensor):
            fix = "Choose the state dict in it by --key, or save that alone."
            raise Refused(f"{name!r:.{LONGEST}} is {type(value).__name__}, not a tensor", fix)
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise Refused(f"{name!r:.{LONGEST}} is {value.type()}, not a dense tensor", "Save it as a dense tensor.")
    named = {name: value for name, value in state.items() if name != COUNTER}
    if not named:
        raise Refused("it holds no tensor")
    names = plain_names(list(named))
    if len(set(names)) < len(names):
        raise Refused("two of its tensors have one name but for 'module.' and '_orig_mod.'")
    pairs = zip(names, named.values(), strict=True)
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in pairs}


def plain_names(names: list[str]) -> list[str]:
    """Without ``_orig_mod.`` of torch.compile, and ``module.`` of DataParallel where all begin with it."""
    found = [name.replace("_orig_mod.", "") for name in names]
    while all(name.startswith("module.") for name in found):
        found = [name.removeprefix("module.") for name in found]
    return found
