"""``kdcore doctor``: what this installation can do, and why it cannot do more."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..plugins import PluginHost
from ..ranks import ranks


def examine(host: PluginHost) -> None:
    """Prints one line a fact."""
    table = Table(show_header=False)
    table.add_row("kdcore", f"{__version__} in {Path(__file__).parents[1]}")
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", "torchvision", "pluggy", "pydantic", "safetensors"):
        table.add_row(name, _version(name))
    table.add_row("cores", str(len(os.sched_getaffinity(0))))
    table.add_row("C++ compiler", shutil.which("c++") or shutil.which("g++") or "none")
    table.add_row("nvcc", shutil.which("nvcc") or "none")
    for name, text in (*_torch_facts(), *_back_ends()):
        table.add_row(name, escape(text))
    table.add_row("plugins", ", ".join(str(origin) for origin in host.origins.values()))
    for reason in host.broken.values():
        table.add_row("broken plugin", escape(reason))
    Console().print(table)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _torch_facts() -> Iterator[tuple[str, str]]:
    import torch

    yield "CUDA devices", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    yield "threads", str(torch.get_num_threads())
    talk = [name for name in ("gloo", "nccl") if torch.distributed.is_backend_available(name)]
    own = ranks()
    yield "processes", f"{own.size}, this is rank {own.rank}; torchrun starts more, which talk by {' and '.join(talk)}"


def _back_ends() -> Iterator[tuple[str, str]]:
    """Of the losses: how each was built and what it runs on, or why it is missing."""
    import torch

    from ..losses._extension import build_info, why_not

    info = build_info()
    details = {}
    if why_not("cpu") is None:
        threads = "OpenMP" if info["openmp"] else "without OpenMP"
        built = f"{info['compiler']}, {threads}, torch {info['torch']}, for torch {info['oldest_torch']} or newer"
        isas = f"{info['isa']} (this machine has {', '.join(info['isas'])})"
        details["cpu"] = f"{isas}; built by {built}; called from {info['autograd']}"
    if why_not("cuda") is None:
        toolkit = f"{info['cuda'] // 1000}.{info['cuda'] % 1000 // 10}"
        device = "" if torch.cuda.is_available() else ", but there is no device"
        details["cuda"] = f'built by CUDA {toolkit} for {info["architectures"]}{device}; only backend="cuda" takes it'
    for name in ("cpu", "cuda"):
        yield f"loss on {name}", f"live: {details[name]}" if name in details else f"missing: {why_not(name)}"
    if "cpu" not in details:
        yield "to build it", "install kdcore again: make clean install, or pip install --no-build-isolation ."
    yield "loss reference", "live: plain torch, for whatever is missing"
