"""Several processes and machines share a store: leases, cleaning, packing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from kdcore import store as sharing
from kdcore.folders import verify
from kdcore.store import Store

KEY, OTHER, THIRD = "a" * 64, "b" * 64, "c" * 64
FILES = {"result.json": b'{"key": "a"}', "student.safetensors": bytes(range(256)) * 8}

HOLDER = """
import os, sys, time
from kdcore.store import Store
store = Store(sys.argv[1])
with store.lease(sys.argv[2], lambda holder: None):
    child = os.fork() if sys.argv[3] == "fork" else 1
    if not child:
        time.sleep(60)
    print(child, flush=True)
    sys.stdin.read()
    store.save_result(sys.argv[2], {"result.json": b'{"by": "holder"}'})
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@contextmanager
def holder(store: Store, key: str = KEY, how: str = ""):
    """Another process that holds a lease until its input closes."""
    command = [sys.executable, "-c", HOLDER, str(store.root), key, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        yield process
        process.kill()
    if child > 1:
        os.kill(child, signal.SIGKILL)


def seconds_until_free(store: Store) -> float:
    started = time.monotonic()
    with store.lease(KEY, lambda holder: None):
        return time.monotonic() - started


# ---------------------------------------------------------------- leases


def test_the_second_waits_for_the_first_and_then_finds_its_result(store):
    with holder(store) as process:
        told = []

        def waiting(text: str) -> None:
            told.append(text)
            if len(told) == 2:
                process.stdin.close()

        with store.lease(KEY, waiting):
            assert store.result(KEY) == {"by": "holder"}
        assert set(told) == {f"process {process.pid}"}


def test_waiting_can_be_given_up(store):
    def give_up(text: str) -> None:
        raise TimeoutError

    with holder(store), pytest.raises(TimeoutError), store.lease(KEY, give_up):
        pass


def test_a_killed_holder_lets_go_at_once(store):
    with holder(store) as process:
        process.kill()
        assert seconds_until_free(store) < 2


def test_a_forked_child_does_not_keep_the_lease_of_its_killed_parent(store):
    with holder(store, how="fork") as process:
        process.kill()
        assert seconds_until_free(store) < 2


def test_a_lease_is_not_inherited_by_a_program_that_its_holder_starts(store):
    with store.lease(KEY, pytest.fail):
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        assert seconds_until_free(store) < 2
    finally:
        sleeper.kill()
        sleeper.wait()


def test_two_threads_of_a_process_exclude_each_other(store):
    order = []

    def second() -> None:
        with store.lease(KEY, lambda holder: None):
            order.append("second")

    with store.lease(KEY, pytest.fail):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# ---------------------------------------------------------------- cleaning


def fill(store: Store) -> None:
    """A result that is kept and one that is not, each key with checkpoints; a third that is not finished."""
    for key in (KEY, OTHER):
        store.save_result(key, FILES)
    for key in (KEY, OTHER, THIRD):
        store.save_checkpoint(key, 1, FILES)
    for name in (
        f"results/.tmp-1-{THIRD}",
        f"results/damaged-1-{THIRD}",
        f"unfinished/{THIRD}/damaged-1-ckpt-00000002",
    ):
        (store.root / name).mkdir(parents=True)


def names(store: Store) -> list[str]:
    found = [*store.root.glob("results/*"), *store.root.glob("unfinished/*"), *store.root.glob("unfinished/*/*")]
    return sorted(path.relative_to(store.root).as_posix() for path in found)


def test_gc_keeps_what_is_named_and_the_checkpoints_of_unfinished_stages(store):
    fill(store)
    removed = store.collect({KEY, THIRD})
    assert names(store) == [f"results/{KEY}", f"unfinished/{THIRD}", f"unfinished/{THIRD}/ckpt-00000001"]
    assert len(removed) == 6
    verify(store.checkpoint(THIRD))


def test_a_dry_gc_removes_nothing_and_says_what_it_would(store):
    fill(store)
    before = names(store)
    would = store.collect({KEY, THIRD}, dry=True)
    assert names(store) == before
    assert would == store.collect({KEY, THIRD})


def test_gc_leaves_alone_what_a_process_holds(store):
    fill(store)
    with holder(store, THIRD):
        store.collect(set())
        assert names(store) == [
            f"results/.tmp-1-{THIRD}", f"results/damaged-1-{THIRD}",
            f"unfinished/{THIRD}", f"unfinished/{THIRD}/ckpt-00000001", f"unfinished/{THIRD}/damaged-1-ckpt-00000002",
        ]  # fmt: skip
    store.collect(set())
    assert names(store) == []


def test_gc_removes_no_file_that_kdcore_did_not_make(store):
    fill(store)
    (store.root / "results" / "README").write_text("mine")
    store.collect(set())
    assert names(store) == ["results/README"]


def test_gc_of_no_store_removes_nothing(store):
    assert store.collect(set()) == []
    assert not store.root.exists()


def test_a_gc_that_is_killed_leaves_no_half_result(store, monkeypatch):
    store.save_result(KEY, FILES)

    def die(path, ignore_errors=False):
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            store.collect(set())
    assert store.stored() == []
    store.collect(set())
    assert names(store) == []


def test_a_part_that_another_process_stores_meanwhile_is_the_one_that_stays(store, monkeypatch):
    commit, rows = sharing.commit, {"rows.safetensors": b"first"}

    def overtaken(parent, name, files):
        commit(parent, name, rows)
        commit(parent, name, files)

    monkeypatch.setattr(sharing, "commit", overtaken)
    for _ in range(2):  # the second time it is there from the start
        folder = store.save_part(KEY, "view-0-part-00000", {"rows.safetensors": b"second"})
        assert store.part(KEY, folder.name) == folder
        assert (folder / "rows.safetensors").read_bytes() == b"first"
