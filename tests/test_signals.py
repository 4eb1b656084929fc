"""Runs that are stopped or lose their workers at random times: the exit code, one result a key, the same weights."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kill import in_child, outcome_hash
from small import Quiet, make_run, weights

from kdcore import pool
from kdcore.errors import DeviceError
from kdcore.journal import Journal
from kdcore.plugins import load_plugins

PLUGIN = Path(__file__).parent / "pair_plugin.py"
RECIPE = """
threads = 1
data = { name = "digits", batch_size = 64 }
teacher = { model = "mlp", size = 2 }
student = { model = "mlp", size = 1 }
train = { epochs = 6 }
execute = { checkpoint_seconds = 0.01, log_every = 7 }
"""
PAIR = ("train.epochs=20", "data.batch_size=64", "execute.checkpoint_seconds=0", "strategy.name='pair'")


# ---------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Outcome of a run that nobody stops, and the seconds in which it listens to signals."""
    root = tmp_path_factory.mktemp("whole")
    (root / "r.toml").write_text(RECIPE)
    child = listening(["run", str(root / "r.toml"), "--root", str(root)])
    started = time.monotonic()
    assert end(child) == 0
    return outcome_hash(root), time.monotonic() - started


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.long)])
def test_a_signal_at_any_time_ends_a_run_and_the_same_command_goes_on_to_the_same_weights(tmp_path, whole, times):
    chance = random.Random(times)
    expected, seconds = whole
    caught, turn = 0, 0
    while caught < times:
        turn += 1
        root = tmp_path / str(turn)
        root.mkdir()
        (root / "r.toml").write_text(RECIPE)
        command = ["run", str(root / "r.toml"), "--root", str(root)]
        number = (signal.SIGTERM, signal.SIGINT)[turn % 2]
        child = listening(command)
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, number)
        code = end(child)
        assert code in (0, 128 + number), code
        if code == 0:
            seconds *= 0.9  # it had finished: the machine is quicker than it was
        else:
            caught += 1
        assert end(in_child(command, lambda: None)) == 0
        assert outcome_hash(root) == expected, f"{number.name} in turn {turn}"


def listening(command: list[str]) -> int:
    """Starts a run; returns its process id once it listens to signals, or is gone."""
    ready, write = os.pipe()
    child = in_child(command, lambda: announce(write))
    os.close(write)
    os.read(ready, 1)
    os.close(ready)
    return child


def announce(pipe: int) -> None:
    """Writes a byte when the run listens to signals; before, a signal ends the process as it ends any."""
    from kdcore.cli import drive

    catch = drive.catch_signals

    def told():
        stopped = catch()
        os.write(pipe, b".")
        return stopped

    drive.catch_signals = told


# ---------------------------------------------------------------- workers


class Killer(Quiet):
    """Kills a worker a random time after any stage begins, so many times."""

    def __init__(self, processes: list[subprocess.Popen], times: int, chance: random.Random) -> None:
        super().__init__()
        self.processes, self.left, self.chance = processes, times, chance

    def handle(self, event) -> None:
        super().handle(event)
        if event["kind"] in ("stage_started", "checkpoint") and self.left and self.chance.random() < 0.5:
            self.left -= 1
            self.processes[-1].kill()


@pytest.fixture(scope="module")
def host():
    return load_plugins(files=[PLUGIN])


def run_with_killer(root: Path, host, times: int, seed: int, *sets: str):
    made = make_run(root, host=host, sets=[*PAIR, *sets], jobs=2)
    with pytest.MonkeyPatch.context() as patch:
        processes, spawn = [], pool.spawn
        patch.setattr(pool, "spawn", lambda threads: processes.append(spawn(threads)) or processes[-1])
        made.console = Killer(processes, times, random.Random(seed))
        made.execute()
    return made


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_killed_workers_leave_one_result_a_key_and_the_same_weights(tmp_path, host, seed):
    make_run(tmp_path / "alone", host=host, sets=PAIR).execute()
    made = run_with_killer(tmp_path, host, 2, seed)
    assert weights(tmp_path) == weights(tmp_path / "alone")
    results = [record["key"] for record in made.journal.of("result")]
    assert len(results) == len(set(results)) == 2
    assert any("worker died" in event["text"] for event in made.console.kinds("warning"))


@pytest.mark.long
def test_a_worker_that_always_dies_is_tried_three_times_and_the_run_goes_on_later(tmp_path, host):
    with pytest.raises(DeviceError, match=r"its worker died 3 times \(exit code -9\)") as found:
        run_with_killer(tmp_path, host, 99, 0)
    assert found.value.exit_code == 7
    assert re.fullmatch(r"stage '.*'", found.value.where)
    make_run(tmp_path, host=host, sets=PAIR).execute()
    results = [record["key"] for record in Journal(tmp_path / "run/journal.jsonl").of("result")]
    assert len(results) == len(set(results)) == 2
