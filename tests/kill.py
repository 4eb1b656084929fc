"""Kills runs with SIGKILL and checks that running them again ends with the uninterrupted run's weights, curves and
decisions, by hash.

    python tests/kill.py RUNS [SEED [RECIPE PLUGIN_FILE]]

Half of the kills come at a write, fsync or rename of the store or journal (a write is cut in the middle), half at a
random instant after the first step; every fifth of those runs two worker processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# imported before the fork, so that a run costs no start-up: most of its seconds, in which a signal meets nothing of
# interest; nothing here starts threads
import jinja2  # noqa: F401
import matplotlib.figure  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo

import kdcore.files
import kdcore.report.page
import kdcore.runner
import kdcore.training.loop
from kdcore.cli import main

RECIPE = """
seed = 3
threads = 1
data = { name = "digits", batch_size = 64, shift = 1 }
teacher = { model = "cnn", size = 1 }
student = { model = "mlp", size = 2, width = 16 }
train = { epochs = 4, optimizer = { name = "adamw" }, lr = 0.005 }
strategy = { name = "assistants", assistants = [{ model = "mlp", size = 3, width = 16 }] }
controller = [{ name = "dskd", patience = 2, mode = "side-by-side" }]
execute = { checkpoint_seconds = 0.001, log_every = 7 }
[[objective]]
loss = "cross_entropy"
[[objective]]
loss = "dkd"
normalize = "class"
weight = 4.0
"""


def in_child(arguments: list[str], prepare: Callable[[], None]) -> int:
    """Forks a process that runs kdcore with these arguments; returns its process id."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    code = 1
    try:
        torch.set_num_threads(1)  # as in ranks.py
        prepare()
        main(arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def at_boundary(fatal: int, counter: Path) -> Callable[[], None]:
    """Counts writes, fsyncs and renames into a file, and dies at the one numbered ``fatal``."""

    def prepare() -> None:
        count = [0]

        def boundary() -> bool:
            count[0] += 1
            counter.write_text(str(count[0]))
            return count[0] == fatal

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        write, append, fsync, rename = kdcore.files.write_file, os.pwrite, os.fsync, os.rename

        def torn_write(path: Path, data: bytes) -> None:
            if boundary():
                Path(path).write_bytes(data[: len(data) // 2])
                die()
            write(path, data)

        def torn_append(handle: int, data: bytes, offset: int) -> int:
            if boundary():
                append(handle, data[: len(data) // 2], offset)
                die()
            return append(handle, data, offset)

        def fatal_fsync(handle: int) -> None:
            if boundary():
                die()
            fsync(handle)

        def fatal_rename(old: Path, new: Path) -> None:
            before = boundary()
            if before and count[0] % 2:
                die()
            rename(old, new)
            if before:
                die()

        kdcore.files.write_file = torn_write
        os.pwrite, os.fsync, os.rename = torn_append, fatal_fsync, fatal_rename

    return prepare


def after_first_step(pipe: int) -> Callable[[], None]:
    """Tells the parent when the first step of a stage is done."""

    def prepare() -> None:
        step = kdcore.training.loop._step

        def first(session: object) -> None:
            step(session)
            os.write(pipe, b".")
            kdcore.training.loop._step = step

        kdcore.training.loop._step = first

    return prepare


def finish(arguments: list[str]) -> None:
    _, status = os.waitpid(in_child(arguments, lambda: None), 0)
    if status:
        raise SystemExit(f"a run ended with status {status}")


def outcome_hash(root: Path) -> str:
    """Of the delivered student, and of weights, curves and decisions of every stored result."""
    folders = sorted(root.glob("store/results/[0-9a-f]*"))  # a kill may leave a half-written .tmp- folder
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    assert len(folders) > 1
    total = hashlib.sha256(next(root.glob("*/student.safetensors")).read_bytes())
    for file in files:
        total.update(file.read_bytes())
    for folder in folders:
        result = json.loads((folder / "result.json").read_bytes())
        curves = {name: member["curve"] for name, member in result["members"].items()}
        total.update(json.dumps([curves, result["events"], result["flops"], result["steps"]]).encode())
    return total.hexdigest()


def kill_at_boundary(arguments: list[str], number: int, counter: Path) -> str:
    _, status = os.waitpid(in_child(arguments, at_boundary(number, counter)), 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a run ended with exit code {os.WEXITSTATUS(status)}")
    return f"boundary {number}"


def kill_at_instant(arguments: list[str], delay: float) -> str:
    ready, told = os.pipe()
    child = in_child(arguments, after_first_step(told))
    os.close(told)
    os.read(ready, 1)  # with workers the driver makes no step itself: end of file at its end, or the delay alone
    os.close(ready)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"{delay:.2f} s after the first step"


def kill_workers(arguments: list[str], delay: float) -> str:
    child = in_child([*arguments, "--jobs", "2"], lambda: None)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"{delay:.2f} s after the start of two workers"


def torture(runs: int, seed: int, recipe_text: str, options: list[str]) -> int:
    """Kills ``runs`` runs; returns how many ended with the right outcome."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "kill.toml")
        recipe.write_text(recipe_text)
        counter = Path(folder, "counter")
        whole = Path(folder, "whole")
        started = time.monotonic()
        kill_at_boundary(["run", str(recipe), *options, "--root", str(whole)], 0, counter)
        seconds, boundaries = time.monotonic() - started, int(counter.read_text())
        expected = outcome_hash(whole)
        print(f"uninterrupted: {seconds:.1f} s, {boundaries} writes, fsyncs and renames, outcome {expected[:12]}")
        good = 0
        for number in range(runs):
            root = Path(folder, f"run{number}")
            arguments = ["run", str(recipe), *options, "--root", str(root)]
            if number % 2 == 0:
                how = kill_at_boundary(arguments, chance.randint(1, boundaries), counter)
            elif number % 10 == 9:
                how = kill_workers(arguments, chance.uniform(3.0, 3.0 + 2 * seconds))
            else:
                how = kill_at_instant(arguments, chance.uniform(0.0, 0.8 * seconds))
            finish(arguments)
            same = outcome_hash(root) == expected
            good += same
            if not same:
                print(f"run {number}, killed at {how}: another outcome")
            shutil.rmtree(root)
    print(f"{good}/{runs}")
    return good


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    entropy = int(sys.argv[2]) if len(sys.argv) > 2 else int.from_bytes(os.urandom(4), "big")
    text = Path(sys.argv[3]).read_text() if len(sys.argv) > 3 else RECIPE
    extra = ["--plugin-file", sys.argv[4]] if len(sys.argv) > 4 else []
    print(f"seed {entropy}", flush=True)
    sys.exit(torture(wanted, entropy, text, extra) != wanted)
