"""Worker processes change nothing but the time: weights, errors, and what a plugin prints."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import Quiet, make_run, weights

from kdcore import pool
from kdcore.cli import main
from kdcore.plugins import load_plugins

PLUGIN = Path(__file__).parent / "pair_plugin.py"
SETS = ("train.epochs=5", "data.batch_size=64", "execute.checkpoint_seconds=0", "strategy.name='pair'")
RECIPE = """
strategy = { name = "pair" }
threads = 1
data = { name = "digits", batch_size = 64 }
teacher = { model = "mlp", size = 2 }
student = { model = "mlp", size = 1 }
train = { epochs = 400 }
execute = { checkpoint_seconds = 0, jobs = 2 }
"""


@pytest.fixture(scope="module")
def host():
    return load_plugins(files=[PLUGIN])


class Killer(Quiet):
    """Kills the worker of the first stage when it has a checkpoint; removes the file that holds it there."""

    def __init__(self, processes: list[subprocess.Popen], hold: Path) -> None:
        super().__init__()
        self.processes, self.hold = processes, hold
        self.last_words: dict = {}

    def handle(self, event) -> None:
        super().handle(event)
        if event["kind"] == "checkpoint" and event["name"] == "mlp-2 on labels" and not self.last_words:
            self.processes[0].kill()
            self.processes[0].wait()
            self.hold.unlink()
            self.last_words = dict(event)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, host):
    """The run in one process."""
    root = tmp_path_factory.mktemp("alone")
    make_run(root, host=host, sets=SETS).execute()
    return root


@pytest.fixture(scope="module")
def killed(tmp_path_factory, host):
    """The same run with two workers, one of which was killed."""
    root = tmp_path_factory.mktemp("killed")
    made = make_run(root, host=host, sets=SETS, jobs=2)
    (root / "hold").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCORE_TEST_HOLD", str(root / "hold"))
        processes, spawn = [], pool.spawn
        patch.setattr(pool, "spawn", lambda threads: processes.append(spawn(threads)) or processes[-1])
        made.console = Killer(processes, root / "hold")
        made.execute()
    assert len(processes) == 3
    return made


def test_jobs_1_and_2_give_equal_weights_though_a_worker_was_killed(alone, killed):
    assert weights(killed.folder.parent) == weights(alone)
    assert len(weights(alone)) == 1


def test_the_stage_of_a_killed_worker_goes_on_from_its_checkpoint_and_has_one_result(killed):
    first = killed.console.last_words
    starts = [record["step"] for record in killed.journal.of("start") if record["key"] == first["key"]]
    assert len(starts) == 2
    assert starts[0] == 0
    assert starts[1] >= first["step"] > 0
    assert len([record for record in killed.journal.of("result") if record["key"] == first["key"]]) == 1
    text = [event["text"] for event in killed.console.kinds("warning") if "worker died" in event["text"]]
    assert re.fullmatch(r"the worker died \(exit code -9\); .* goes on from its last checkpoint", text[0])


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_plugin_prints_and_how_it_fails_is_the_same_in_a_worker(capfd, monkeypatch, tmp_path, jobs):
    monkeypatch.setattr("kdcore.cli.drive.catch_signals", lambda: lambda: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue.py").write_text("raise SystemExit('this file hides the one of Python')")
    (tmp_path / "r.toml").write_text(RECIPE)
    with pytest.raises(SystemExit) as end:
        main(["run", "r.toml", "--plugin-file", str(PLUGIN), "--set", "strategy.fail=boom", "--jobs", str(jobs)])
    assert end.value.code == 3
    text = "".join(capfd.readouterr())
    for part in (
        "printed by",
        "written by",
        "echoed by",
        "ValueError: boom",
        "in plugin pair_plugin",
        "pair_plugin.py line",
    ):
        assert part in text


def children(process: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def test_workers_end_within_seconds_of_a_killed_driver(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "kdcore", "run", "r.toml", "--plugin-file", str(PLUGIN)]
    with subprocess.Popen([*command, "--set", "strategy.seconds=0.01"], cwd=tmp_path, stdout=-3, stderr=-3) as driver:
        assert wait_for(lambda: len({p.parent for p in tmp_path.glob("runs/store/unfinished/*/ckpt-*")}) == 2, 60)
        workers = children(driver.pid)
        assert len(workers) == 2
        driver.kill()
    assert wait_for(lambda: not any(map(alive, workers)), 5)
