"""Worker processes change nothing but the time, whatever happens to them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import stored_weights
from small import Quiet, make_run

import kdcore.errors
from kdcore import executor
from kdcore.cli import main
from kdcore.errors import DeviceError, Interrupted, KdError
from kdcore.executor import Context, LocalExecutor, _error, _Pool
from kdcore.job import Job, Settings
from kdcore.plugins import load_plugins
from kdcore.worker import describe

# ---------------------------------------------------------------- the protocol, with workers that train nothing

FAKE = """
import json, os, signal, sys, time
def send(**message):
    os.write(1, (json.dumps(message) + "\\n").encode())
for line in sys.stdin:
    job = json.loads(line)
    name, key = job["name"], job["key"]
    send(kind="begins", key=key, name=name)
    if name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if name in ("deaf", "slow"):
        send(kind="ready", key=key, name=name)
        time.sleep(60)
    if name == "forks" and not os.fork():
        time.sleep(5)
    if name == "cut":
        os.write(1, b'{"kind": "result", "result": {"half')
    if name in ("dies", "forks", "cut"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "refuses":
        message = dict(type="DataError", what="no", where="here", fix="mend", notes=["a note"], signal=0)
        send(kind="error", **message)
        continue
    send(kind="result", result={"key": key})
    if name == "dies-idle":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def fakes(monkeypatch):
    """Replaces the worker program; holds the processes that were started."""
    started = []

    def spawn(threads: int) -> subprocess.Popen:
        command = [sys.executable, "-S", "-c", FAKE]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    monkeypatch.setattr(executor, "_spawn", spawn)
    yield started
    assert all(process.poll() is not None for process in started)


def job(name: str, *needs: str, key: str = "") -> Job:
    return Job(key or name, name, {}, needs, Settings(store=""))


def run(jobs: list[Job], events: list | None = None, size: int = 2, stopped=lambda: 0) -> list[str]:
    pool = _Pool(size, stopped, (events if events is not None else []).append)
    return [key for key, _ in pool.run(jobs)]


def test_a_stage_starts_only_after_what_it_needs(fakes):
    events = []
    jobs = [job("d", "b", "c"), job("c", "a"), job("b", "a"), job("a"), job("e", "elsewhere")]
    order = []
    pool = _Pool(2, lambda: 0, events.append)
    for key, _ in pool.run(jobs):
        order.append(key)
        begun = [event["key"] for event in events]
        for one in jobs:
            if one.key in begun:
                assert set(one.needs) - {"elsewhere"} <= set(order)
    assert sorted(order) == ["a", "b", "c", "d", "e"]
    assert len(fakes) == 2


@pytest.mark.parametrize("death", ["dies", "cut", "forks"])
def test_a_worker_that_always_dies_is_a_device_error_after_three_tries(fakes, death):
    events, started = [], time.monotonic()
    with pytest.raises(DeviceError, match=r"its worker died 3 times \(exit code -9\)\. If the system") as found:
        run([job(death)], events)
    assert found.value.where == f"stage {death!r}"
    assert [event["kind"] for event in events].count("warning") == 2
    assert len(fakes) == 3
    assert time.monotonic() - started < 5  # also where a process that the dead one forked keeps its output open


def test_a_worker_that_dies_between_two_stages_costs_neither(fakes):
    assert run([job("dies-idle"), job("next", "dies-idle")], size=1) == ["dies-idle", "next"]


def test_a_worker_that_is_dead_when_it_gets_its_stage_is_replaced(fakes, monkeypatch):
    spawn = executor._spawn

    def stillborn(threads: int) -> subprocess.Popen:
        process = spawn(threads)
        if len(fakes) == 1:
            process.kill()
            process.wait()
        return process

    monkeypatch.setattr(executor, "_spawn", stillborn)
    assert run([job("a")]) == ["a"]


def test_the_others_end_when_one_stage_fails(fakes):
    with pytest.raises(kdcore.errors.DataError, match=r"here: no\. mend") as found:
        run([job("slow"), job("refuses")])
    assert found.value.__notes__ == ["a note"]


def test_workers_end_when_the_driver_fails_between_two_results(fakes):
    def drive() -> None:
        local = LocalExecutor(None, Context(None, None), jobs=2)
        for _ in local.execute([job("a"), job("slow")], lambda event: None):
            raise MemoryError

    with pytest.raises(MemoryError):
        drive()


def test_workers_end_when_an_event_makes_the_driver_fail(fakes):
    def emit(event) -> None:
        raise kdcore.errors.PreflightError("strict")

    with pytest.raises(kdcore.errors.PreflightError):
        list(_Pool(2, lambda: 0, emit).run([job("slow")]))


def test_a_worker_that_does_not_stop_is_killed(fakes, monkeypatch):
    monkeypatch.setattr(executor, "PATIENCE", 0.5)
    events = []
    with pytest.raises(Interrupted):
        run([job("deaf")], events, stopped=lambda: 15 if len(events) == 2 else 0)
    assert fakes[0].returncode == -signal.SIGKILL


def test_no_worker_is_a_device_error(monkeypatch):
    def refuse(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(DeviceError, match="cannot start a worker"):
        run([job("a")])


# ---------------------------------------------------------------- errors


class PluginsOwnError(kdcore.errors.DataError):
    """What a plugin may derive."""


KNOWN = [cls for cls in vars(kdcore.errors).values() if isinstance(cls, type) and issubclass(cls, KdError)]


@pytest.mark.parametrize("cls", [*set(KNOWN) - {Interrupted}, PluginsOwnError])
def test_an_error_keeps_its_class_its_text_and_its_exit_code_on_the_way(cls):
    error = cls("what", where="where", fix="fix")
    error.add_note("note")
    again = _error(describe(error))
    assert type(again) is (kdcore.errors.DataError if cls is PluginsOwnError else cls)
    assert (str(again), again.exit_code, again.__notes__) == (str(error), error.exit_code, ["note"])


def test_a_signal_keeps_its_number_on_the_way():
    assert _error(describe(Interrupted(15))).exit_code == 143


def test_another_error_brings_its_traceback():
    try:
        {}["missing"]
    except KeyError as error:
        again = _error(describe(error))
    assert "KeyError: 'missing'" in str(again)
    assert "test_executor.py" in str(again)


# ---------------------------------------------------------------- real workers

PLUGIN = Path(__file__).parent / "pair_plugin.py"
SETS = ("train.epochs=20", "data.batch_size=64", "execute.checkpoint_seconds=0", "strategy.name='pair'")
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
    """Kills the worker of the first stage when it has a checkpoint."""

    def __init__(self, processes: list[subprocess.Popen]) -> None:
        super().__init__()
        self.processes = processes
        self.last_words: dict = {}

    def handle(self, event) -> None:
        super().handle(event)
        if event["kind"] == "checkpoint" and event["name"] == "mlp-2 on labels" and not self.last_words:
            self.processes[0].kill()
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
    made = make_run(tmp_path_factory.mktemp("killed"), host=host, sets=SETS, jobs=2)
    with pytest.MonkeyPatch.context() as patch:
        processes, spawn = [], executor._spawn
        patch.setattr(executor, "_spawn", lambda threads: processes.append(spawn(threads)) or processes[-1])
        made.console = Killer(processes)
        made.execute()
    assert len(processes) == 3
    return made


def test_jobs_1_and_2_give_equal_weights_though_a_worker_was_killed(alone, killed):
    assert stored_weights(killed.folder.parent) == stored_weights(alone)
    assert len(stored_weights(alone)) == 1


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
        assert wait_for(lambda: len({p.parent for p in tmp_path.glob("runs/store/work/*/ckpt-*")}) == 2, 60)
        workers = children(driver.pid)
        assert len(workers) == 2
        driver.kill()
    assert wait_for(lambda: not any(map(alive, workers)), 5)
