"""``kdcore doctor``: what this installation can do, and why it cannot do more."""

from __future__ import annotations

import os
import platform
import shutil
import time
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
    yield "convolutions", _convolutions()
    talk = [name for name in ("gloo", "nccl") if torch.distributed.is_backend_available(name)]
    own = ranks()
    yield "processes", f"{own.size}, this is rank {own.rank}; torchrun starts more, which talk by {' and '.join(talk)}"


def _convolutions(tries: int = 5) -> str:
    """Which precision is the faster on this CPU: its instructions for bfloat16 may be slower than those for float32."""
    import torch

    took: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    images = torch.randn(16, 64, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(tries):
            for dtype, seconds in took.items():
                one, x = layer.to(dtype), images.to(dtype)
                start = time.perf_counter()
                one(x)
                seconds.append(time.perf_counter() - start)
    ratio = min(took[torch.bfloat16]) / min(took[torch.float32])
    better = "float32" if ratio > 1 else "bfloat16"
    return f'on the CPU bfloat16 takes {ratio:.2f} times the seconds of float32: precision = "{better}" is the faster'


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
