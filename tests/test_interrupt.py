"""A run that is stopped, by a signal, a full disk or a second run, goes on from where it was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from small import weights

from kdcore.cli import main
from kdcore.journal import Journal
from kdcore.testing.faults import failing_disk

PLUGIN = Path(__file__).parent / "pair_plugin.py"
RECIPE = """
threads = 1
data = { name = "digits", batch_size = 64 }
teacher = { model = "mlp", size = 2 }
student = { model = "mlp", size = 1 }
train = { epochs = 20 }
strategy = { name = "pair", seconds = 0.001 }
execute = { checkpoint_seconds = 0, log_every = 7 }
"""
TWICE = [(signal.SIGTERM, 2), (signal.SIGINT, 1)]  # other pairs have both signals, and both numbers of workers
SIGNALS = [(signal.SIGTERM, 1), (signal.SIGINT, 2), *(pytest.param(*pair, marks=pytest.mark.long) for pair in TWICE)]


@dataclass
class Stopped:
    """How a run ended after a signal."""

    root: Path
    code: int
    seconds: float
    out: str
    err: str


def start(root: Path, *options: str) -> subprocess.Popen:
    root.mkdir(exist_ok=True)
    (root / "r.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "kdcore", "run", "r.toml", "--root", ".", "--plugin-file", str(PLUGIN), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for_checkpoints(root: Path, count: int, process: subprocess.Popen) -> None:
    """Until so many stages have a checkpoint; one that is finished has no more."""

    def begun() -> int:
        checkpoints = {path.parent for path in root.glob("store/unfinished/*/ckpt-*")}
        return len(checkpoints) and len(checkpoints) + len(list(root.glob("store/results/*/result.json")))

    while begun() < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def stop(root: Path, number: int, jobs: int, process: subprocess.Popen) -> Stopped:
    wait_for_checkpoints(root, jobs, process)
    started = time.monotonic()
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal does
    out, err = process.communicate(timeout=60)
    return Stopped(root, process.returncode, time.monotonic() - started, out, err)


def kdcore(capsys, root: Path, *options: str) -> tuple[int, str, str]:
    """The same command, in this process."""
    (root / "r.toml").write_text(RECIPE)
    return command(capsys, root, "run", "r.toml", "--root", ".", "--plugin-file", str(PLUGIN), *options)


def command(capsys, root: Path, *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcore.cli.drive.catch_signals", lambda: lambda: 0)
        patch.chdir(root)
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
    return int(end.value.code or 0), *capsys.readouterr()


def journal(root: Path) -> Journal:
    return Journal(next(root.glob("r-*/journal.jsonl")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two runs at the same time in one store, which nobody stops."""
    root = tmp_path_factory.mktemp("whole")
    processes = [start(root / name, "--store", str(root / "store")) for name in ("first", "second")]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return root


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Gives a run that was sent a signal, with one or two workers."""

    @cache
    def found(number: signal.Signals, jobs: int) -> Stopped:
        root = tmp_path_factory.mktemp(f"{number.name}-{jobs}")
        return stop(root, number, jobs, start(root, "--jobs", str(jobs)))

    return found


# ---------------------------------------------------------------- two runs at once


def test_two_runs_at_once_train_each_stage_once_and_end_equal(whole):
    journals = [journal(whole / name) for name in ("first", "second")]
    starts = [record["key"] for each in journals for record in each.of("start")]
    assert len(starts) == len(set(starts)) == 2
    results = [{record["key"]: record["curves"] for record in each.of("result")} for each in journals]
    assert results[0] == results[1]
    students = [next((whole / name).glob("r-*/student.safetensors")) for name in ("first", "second")]
    assert students[0].read_bytes() == students[1].read_bytes()


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "jobs"), SIGNALS)
def test_a_signal_ends_a_run_within_seconds_with_its_exit_code_and_one_message(stopped, number, jobs):
    end = stopped(number, jobs)
    assert end.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert end.seconds < 30
    last = [line for line in end.err.splitlines() if "by a plugin" not in line]
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert last == [f"kdcore: Interrupted: stopped by {name}. Run the same command to go on."]
    assert "Traceback" not in end.out + end.err


@pytest.mark.parametrize(("number", "jobs"), SIGNALS)
def test_the_same_command_goes_on_from_there_to_the_same_weights(stopped, whole, tmp_path, capsys, number, jobs):
    shutil.copytree(stopped(number, jobs).root, tmp_path, dirs_exist_ok=True)
    before = {path.parent.name: int(path.name[5:]) for path in sorted(tmp_path.glob("store/unfinished/*/ckpt-*"))}
    assert before
    assert all(step > 0 for step in before.values())
    assert kdcore(capsys, tmp_path)[0] == 0
    starts = {record["key"]: record["step"] for record in journal(tmp_path).of("start")}
    assert before.items() <= starts.items()
    assert weights(tmp_path) == weights(whole)


def test_a_second_signal_exits_at_once(tmp_path):
    process = start(tmp_path, "--set", "strategy.seconds=60", "--set", "execute.log_every=1")
    while not list(tmp_path.glob("r-*/journal.jsonl")) or not list(journal(tmp_path).of("start")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


# ---------------------------------------------------------------- storage, through the command line


def test_gc_keeps_the_checkpoints_of_a_stopped_run_and_removes_what_no_journal_names(stopped, tmp_path, capsys):
    root, store = tmp_path / "runs", tmp_path / "runs" / "store"
    shutil.copytree(stopped(signal.SIGTERM, 1).root, root)
    before = sorted([*store.glob("unfinished/*/ckpt-*"), *store.glob("results/*")])
    assert before
    shutil.copytree(before[-1].parent, store / "unfinished" / ("d" * 64))
    (store / "results" / ("e" * 64)).mkdir(parents=True)
    dry = command(capsys, tmp_path, "store", "gc", "--dry-run")
    assert (store / "results" / ("e" * 64)).is_dir()
    done = command(capsys, tmp_path, "store", "gc")
    assert done[1].splitlines()[:-1] == dry[1].splitlines()[:-1]
    assert done[1].endswith("2 folders removed\n")
    assert sorted([*store.glob("unfinished/*/ckpt-*"), *store.glob("results/*")]) == before


def check_full_disk(capsys, root: Path, number: int) -> None:
    with failing_disk(number, 1000):
        code, _, err = kdcore(capsys, root)
    assert code == 4, (number, err)
    assert "No space left on device" in err
    assert err.endswith("Make room or mend it, then run again.\n")
    assert "Traceback" not in err


def test_a_full_disk_ends_a_run_with_exit_code_4_and_it_goes_on_after(stopped, whole, tmp_path, capsys):
    shutil.copytree(stopped(signal.SIGTERM, 1).root, tmp_path, dirs_exist_ok=True)
    for number in (1, 9, 30, 60):
        check_full_disk(capsys, tmp_path, number)
    assert kdcore(capsys, tmp_path)[0] == 0
    assert weights(tmp_path) == weights(whole)
    with failing_disk() as disk:
        assert kdcore(capsys, tmp_path)[0] == 0
    assert disk.count >= 12
    for number in range(1, disk.count + 1):
        check_full_disk(capsys, tmp_path, number)
    assert kdcore(capsys, tmp_path)[0] == 0


def test_a_read_only_run_folder_is_a_storage_error(tmp_path, capsys):
    with failing_disk(1, 1000, errno.EROFS):
        code, _, err = kdcore(capsys, tmp_path)
    assert code == 4
    assert "kdcore: StorageError: " in err
    assert "Read-only file system" in err


def test_a_damaged_journal_is_exit_code_4_and_says_what_to_do(whole, tmp_path, capsys):
    shutil.copytree(whole / "first", tmp_path, dirs_exist_ok=True)
    path = next(tmp_path.glob("r-*/journal.jsonl"))
    path.write_bytes(path.read_bytes().replace(b"ask", b"axk"))
    code, _, err = kdcore(capsys, tmp_path)
    assert code == 4
    assert "line 2 is damaged. Move the run's folder away and run again: finished stages are in the store." in err
