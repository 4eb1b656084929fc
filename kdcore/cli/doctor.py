"""``kdcore doctor``: what this installation can do, and why it cannot do more."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..plugins import PluginHost


def examine(host: PluginHost) -> None:
    """Prints one line a fact."""
    table = Table(show_header=False)
    table.add_row("kdcore", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", "torchvision", "pluggy", "pydantic", "safetensors"):
        table.add_row(name, _version(name))
    table.add_row("cores", str(len(os.sched_getaffinity(0))))
    table.add_row("C++ compiler", shutil.which("c++") or shutil.which("g++") or "none")
    table.add_row("nvcc", shutil.which("nvcc") or "none")
    for name, text in _torch_facts():
        table.add_row(name, text)
    table.add_row("plugins", ", ".join(str(origin) for origin in host.origins.values()))
    for reason in host.broken.values():
        table.add_row("broken plugin", escape(reason))
    Console().print(table)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _torch_facts() -> list[tuple[str, str]]:
    import torch

    from ..losses import available_backends

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    back_ends = ", ".join(available_backends())
    return [
        ("CUDA devices", ", ".join(gpus) or "none"),
        ("threads", str(torch.get_num_threads())),
        ("loss back ends", f"{back_ends} (this version has no compiled one)"),
    ]
