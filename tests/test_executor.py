"""Worker processes change nothing but the time, whatever happens to them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from small import make_run

import kdcore.errors
from kdcore import pool
from kdcore.errors import DeviceError, Interrupted, KdError, StorageError
from kdcore.executor import Context, LocalExecutor, under_lease
from kdcore.job import Job, Settings
from kdcore.pool import Pool, error_of
from kdcore.store import Store
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
        time.sleep(60)
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

    monkeypatch.setattr(pool, "spawn", spawn)
    yield started
    assert all(process.poll() is not None for process in started)


def job(name: str, *needs: str, key: str = "") -> Job:
    return Job(key or name, name, {}, needs, [], Settings(store=""))


def run(jobs: list[Job], events: list | None = None, size: int = 2, stopped=lambda: 0) -> list[str]:
    workers = Pool(size, stopped)
    try:
        return [key for key, _ in workers.run(jobs, (events if events is not None else []).append)]
    finally:
        workers.close()


def test_a_stage_starts_only_after_what_it_needs(fakes):
    events = []
    jobs = [job("d", "b", "c"), job("c", "a"), job("b", "a"), job("a"), job("e", "elsewhere")]
    order = []
    workers = Pool(2, lambda: 0)
    for key, _ in workers.run(jobs, events.append):
        order.append(key)
        begun = [event["key"] for event in events]
        for one in jobs:
            if one.key in begun:
                assert set(one.needs) - {"elsewhere"} <= set(order)
    assert sorted(order) == ["a", "b", "c", "d", "e"]
    assert [key for key, _ in workers.run([job("f")], events.append)] == ["f"]  # the workers stayed
    assert len(fakes) == 2
    workers.close()


@pytest.mark.parametrize("death", ["dies", "cut", "forks"])
def test_a_worker_that_always_dies_is_a_device_error_after_three_tries(fakes, death):
    events, started = [], time.monotonic()
    with pytest.raises(DeviceError, match=r"its worker died 3 times \(exit code -9\)\. If the system") as found:
        run([job(death)], events)
    assert found.value.where == f"stage {death!r}"
    assert [event["kind"] for event in events].count("warning") == 2
    assert len(fakes) == 3
    assert time.monotonic() - started < 30  # also where a process that the dead one forked keeps its output open


def test_a_worker_that_dies_between_two_stages_costs_neither(fakes):
    assert run([job("dies-idle"), job("next", "dies-idle")], size=1) == ["dies-idle", "next"]


def test_a_worker_that_is_dead_when_it_gets_its_stage_is_replaced(fakes, monkeypatch):
    spawn = pool.spawn

    def stillborn(threads: int) -> subprocess.Popen:
        process = spawn(threads)
        if len(fakes) == 1:
            process.kill()
            process.wait()
        return process

    monkeypatch.setattr(pool, "spawn", stillborn)
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
        list(Pool(2, lambda: 0).run([job("slow")], emit))


def test_a_worker_that_does_not_stop_is_killed(fakes, monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE", 0.5)
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


@pytest.mark.parametrize("cls", [*(c for c in KNOWN if c is not Interrupted), PluginsOwnError])
def test_an_error_keeps_its_class_its_text_and_its_exit_code_on_the_way(cls):
    error = cls("what", where="where", fix="fix")
    error.add_note("note")
    again = error_of(describe(error))
    assert type(again) is (kdcore.errors.DataError if cls is PluginsOwnError else cls)
    assert (str(again), again.exit_code, again.__notes__) == (str(error), error.exit_code, ["note"])


def test_a_signal_keeps_its_number_on_the_way():
    assert error_of(describe(Interrupted(15))).exit_code == 143


def test_another_error_brings_its_traceback():
    try:
        {}["missing"]
    except KeyError as error:
        again = error_of(describe(error))
    assert "KeyError: 'missing'" in str(again)
    assert "test_executor.py" in str(again)


@pytest.mark.parametrize(("damage", "says"), [({"seconds": "long"}, "seconds"), ({"key": "0" * 64}, "result of 0000")])
def test_what_an_executor_brings_is_read_as_any_stored_result(tmp_path, monkeypatch, damage, says):
    execute = LocalExecutor.execute

    def other(self, jobs, emit):
        yield from ((key, {**result, **damage}) for key, result in execute(self, jobs, emit))

    monkeypatch.setattr(LocalExecutor, "execute", other)
    with pytest.raises(StorageError, match=says):
        make_run(tmp_path, sets=["train.epochs=1"]).execute()


def test_a_result_that_comes_from_another_machine_leaves_no_checkpoints(tmp_path):
    made = make_run(tmp_path, sets=["train.epochs=1"])
    made.execute()
    job = made.keys.job(made.view.label_only("teacher", made.view.teacher))
    there, here = made.store, Store(tmp_path / "here")
    there.pack(tmp_path / "results.tar", [job.key])

    def bring(store, send):
        store.save_checkpoint(job.key, 3, {"state.json": b"{}"})
        store.unpack(tmp_path / "results.tar")
        return store.result(job.key)

    job = replace(job, settings=replace(job.settings, store=str(here.root)))
    under_lease(job, lambda: 0, lambda event: None, bring)
    assert here.result(job.key) is not None
    assert not list((here.root / "unfinished").iterdir())
