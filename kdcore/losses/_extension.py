"""Loading of the compiled op, and why a part of it is not there.

Loading ``kdcore._C`` registers the ops with torch and their CPU kernels, ``kdcore._C_cuda`` adds the CUDA ones. Nothing
is loaded before the first question is asked, and a module that fails to load stays away without an error: the losses
then run on the reference.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ISAS = ("generic", "avx2", "avx512")
_PACKAGE = __name__.partition(".")[0]


class _Part(NamedTuple):
    """A module, or why there is none."""

    module: ModuleType | None
    problem: str | None = None


def cpu_ops() -> bool:
    """Whether the CPU kernels are loaded."""
    return _cpu().module is not None


def cuda_ops() -> bool:
    """Whether the CUDA kernels are loaded; a device to run them on is another question."""
    return _cuda().module is not None


def autograd() -> ModuleType | None:
    """The module that calls the op with its derivative from C++; it wants the torch that it was built with."""
    return _autograd().module


def why_not(name: str) -> str | None:
    """Why the back end "cpu" or "cuda", or the short way "autograd", is missing; None if it is not."""
    return {"cpu": _cpu, "cuda": _cuda, "autograd": _autograd}[name]().problem


def build_info() -> dict[str, Any]:
    """How the loaded modules were built, and what this machine makes of them; empty without them."""
    cpu, cuda = _cpu().module, _cuda().module
    if cpu is None:
        return {}
    info: dict[str, Any] = {**cpu.build_info(), "isa": cpu.cpu_isa(), "isas": cpu.available_isas()}
    info["autograd"] = "C++" if autograd() else f"the dispatcher, slower for small batches: {why_not('autograd')}"
    if cuda is not None:
        info |= {"cuda": cuda.cuda_version, "architectures": cuda.architectures}
    return info


@cache
def _cpu() -> _Part:
    import torch  # the module's libraries are torch's: it finds them only where torch has loaded them

    # a second set of registrations would end the process
    if f"{_PACKAGE}._C" not in sys.modules and hasattr(torch.ops.kdcore, "fused"):
        return _Part(None, "another copy of kdcore has loaded its op in this process; import one of them alone")
    part = _import("_C")
    isa = os.environ.get("KDCORE_CPU_ISA")
    if part.module and isa and isa not in ISAS:
        warnings.warn(f"KDCORE_CPU_ISA={isa!r} is unknown and ignored. Use one of {', '.join(ISAS)}.", stacklevel=2)
    return part


@cache
def _cuda() -> _Part:
    if why := _cpu().problem:
        return _Part(None, f"it needs the CPU one: {why}")
    return _import("_C_cuda")


@cache
def _autograd() -> _Part:
    import torch

    if why := _cpu().problem:
        return _Part(None, f"it needs the CPU one: {why}")
    if _facts().get("torch") != torch.__version__:  # loading it might end the process
        return _Part(None, f"it was built with torch {_facts().get('torch')}, this is {torch.__version__}")
    return _import("_C_autograd")


def _import(name: str) -> _Part:
    full = f"{_PACKAGE}.{name}"
    try:
        return _Part(importlib.import_module(full))
    except ModuleNotFoundError as error:
        if error.name == full:
            return _Part(None, _never_built(name))
        return _Part(None, f"{name} does not load: {error}")
    except ImportError as error:
        return _Part(None, f"{name} does not load: {error}")


def _never_built(name: str) -> str:
    """What setup.py noted when it left the module out."""
    missing = _facts().get("missing", {})
    if name in missing:
        return str(missing[name])
    return f"{name} was not built for {sys.implementation.cache_tag}; install kdcore again, with this Python"


def _facts() -> dict[str, Any]:
    """What setup.py left beside the modules: the torch that they were built with, and what is missing and why."""
    try:
        facts = json.loads(Path(__file__).parents[1].joinpath("_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {}
    return facts if isinstance(facts, dict) else {}
