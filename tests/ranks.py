"""Two processes that talk by gloo, for tests: a function in each, or a command of kdcore.

They are forks of this one, so that they cost no start-up.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# imported before the fork, as in kill.py
import jinja2  # noqa: F401
import matplotlib.figure  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
import torch.distributed as dist

import kdcore.report.page
import kdcore.runner
import kdcore.training.loop  # noqa: F401
from kdcore.cli import main

PATIENCE = 200  # seconds after which a process that waits for something tells for what, and ends


SERVER = """
import sys
from torch.distributed import TCPStore

stores = []
for line in sys.stdin:
    stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    print(stores[-1].port, flush=True)
"""


@cache
def server() -> subprocess.Popen:
    """Makes stores, as torchrun's agent has one, until this process ends: their threads must not be where forks are."""
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def environments(size: int) -> list[dict[str, str]]:
    """What torchrun sets for each process, with a new store."""
    server().stdin.write("\n")
    server().stdin.flush()
    port = int(server().stdout.readline())
    return [environment(rank, size, port) for rank in range(size)]


def environment(rank: int, size: int, port: int = 0) -> dict[str, str]:
    """What torchrun sets for a process, and that gloo takes the loopback whatever the host's name stands for."""
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_ADDR": "127.0.0.1"}
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return agent | {"GLOO_SOCKET_IFNAME": "lo"} | {name: str(value) for name, value in names.items()}


def forked(function: Callable[[], Any], changes: dict[str, str], out: Path) -> int:
    """Starts a process that calls the function, what it prints in a file; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = os.fdopen(handle, "a", buffering=1)  # pytest has put others there
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.stderr)
        os.environ.update(changes)
        torch.set_num_threads(1)  # those of OpenMP stayed in the parent, and a fork that used them would wait for them
        function()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def end(child: int) -> int:
    """The exit code of a process, once it has ended; that of a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_two_ranks(function: str) -> list[Any]:
    """What ``module:function(rank, group)`` gives in each of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")

        def work(rank: int) -> None:
            module, _, name = function.partition(":")
            dist.init_process_group("gloo")
            result = getattr(importlib.import_module(module), name)(rank, dist.group.WORLD)
            torch.save(result, Path(folder, str(rank)))

        children = [forked(lambda r=r: work(r), changes, out) for r, changes in enumerate(environments(2))]
        codes = [end(child) for child in children]
        assert codes == [0, 0], out.read_text()
        return [torch.load(Path(folder, str(rank))) for rank in range(2)]


@dataclass
class Command:
    """A command of kdcore in several processes."""

    children: list[int]
    out: Path

    def codes(self) -> list[int]:
        """Exit codes, by rank."""
        return [end(child) for child in self.children]


def command(
    arguments: Sequence[str], folder: Path, size: int = 2, prepare: Callable[[int], None] = lambda rank: None
) -> Command:
    """Starts a command as torchrun does, in ``size`` processes that print into ``folder/out``."""
    out = folder / "out"
    out.write_text("")

    def work(rank: int) -> None:
        os.chdir(folder)
        prepare(rank)
        main(list(arguments))

    return Command([forked(lambda r=r: work(r), changes, out) for r, changes in enumerate(environments(size))], out)
