"""The script of docs/python.md: a person's own modules and data in 15 lines, killed, run again, and in a notebook."""

from __future__ import annotations

import asyncio
import hashlib
import linecache
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT, *OTHERS = re.findall(r"^```python\n(.*?)^```", (DOCS / "python.md").read_text(), re.S | re.M)
SLOW = """
import time
class Slow:
    @kdcore.hookimpl
    def kdcore_epoch_finished(self):
        time.sleep(0.05)
"""
END = 'controllers=["dskd"])'


def start(folder: Path, text: str) -> subprocess.Popen:
    (folder / "mine.py").write_text(text)
    return subprocess.Popen(
        [sys.executable, "mine.py"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    return out


def kill_in_the_middle(folder: Path, process: subprocess.Popen) -> None:
    """At the second stage's first checkpoint."""
    begun = finished = set[str]()
    while not (finished and begun - finished):  # a stage's checkpoints are there for a moment after its result
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
        begun = {path.parent.name for path in folder.glob("runs/store/unfinished/[0-9a-f]*/ckpt-*")}  # nor .tmp-*
        finished = {path.name for path in folder.glob("runs/store/results/[0-9a-f]*")}  # not .tmp-*
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def students(folder: Path) -> set[str]:
    """Hashes of the students of all runs."""
    files = folder.glob("runs/distill-*/student.safetensors")
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> tuple[Path, str]:
    """The script's folder after it was killed and run again, and what it printed then."""
    folder = tmp_path_factory.mktemp("killed")
    slow = SCRIPT.replace(END, END[:-1] + ', execute={"checkpoint_seconds": 0}, plugins=[Slow()])')
    assert slow != SCRIPT
    kill_in_the_middle(folder, start(folder, slow.replace("torch.manual_seed", SLOW + "torch.manual_seed")))
    assert not students(folder)
    return folder, finish(start(folder, SCRIPT))


async def run_cell(text: str, scope: dict[str, Any]) -> None:
    """As a notebook's kernel runs a cell: in a running event loop, with the cell's source in linecache."""
    name = "<cell 1>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), scope)


def test_the_script_has_15_lines():
    assert len([line for line in SCRIPT.splitlines() if line]) == 15


def test_a_killed_script_goes_on_to_the_weights_of_a_notebook_that_nobody_stops(resumed, tmp_path, monkeypatch):
    folder, out = resumed
    assert "goes on from step" in out
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "__main__"}
    asyncio.run(run_cell(SCRIPT, scope))
    assert scope["result"].warnings == []
    assert scope["result"].accuracy > 0.5
    assert students(folder) == students(tmp_path)
    assert {path.name for path in folder.glob("runs/distill-*")} == {scope["result"].folder.name}


def test_the_second_time_nothing_is_trained_and_the_other_blocks_work(resumed):
    folder, _ = resumed
    before = students(folder)
    again = finish(start(folder, SCRIPT + "".join(OTHERS)))
    assert again.count("(from the store)") == 3
    assert before < students(folder)  # the other blocks are another run


def test_the_docs_link_to_files_that_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / "python.md").read_text()):
        assert (DOCS / target).exists(), target
