"""What is stored is whole and sound, or it is not there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from small import make_run, weights

from kdcore.errors import Interrupted, StorageError
from kdcore.folders import FORMAT, MANIFEST, DamagedError, FormatError, _seal, commit, verify
from kdcore.plugins import load_plugins
from kdcore.store import Store
from kdcore.testing.faults import damage, failing_disk

KEY, OTHER = "a" * 64, "b" * 64
FILES = {"state.json": b'{"step": 1}', "tensors.safetensors": bytes(range(256)) * 8}
RESULT = {"result.json": b'{"key": "a"}', "student.safetensors": bytes(range(256)) * 8}
SETS = ("train.epochs=3", "execute.checkpoint_seconds=0")


@pytest.fixture
def store(tmp_path):
    warnings: list[str] = []
    made = Store(tmp_path / "store", warnings.append)
    made.warnings = warnings
    return made


# ---------------------------------------------------------------- a full disk


def save_result(store: Store) -> None:
    store.save_result(KEY, RESULT)


def save_checkpoint(store: Store) -> None:
    store.save_checkpoint(KEY, 20, FILES)


def boundaries(tmp_path: Path, save) -> int:
    probe = Store(tmp_path / "probe")
    probe.save_checkpoint(KEY, 10, FILES)
    with failing_disk() as disk:
        save(probe)
    return disk.count - (save is save_result)  # the last one moves checkpoints that nobody needs: it may fail


@pytest.mark.parametrize("save", [save_result, save_checkpoint])
def test_a_full_disk_at_any_point_leaves_the_checkpoint_before_and_no_half_folder(tmp_path, save):
    total = boundaries(tmp_path, save)
    assert total >= 6
    for number in range(1, total + 1):
        store = Store(tmp_path / f"store{number}")
        before = store.save_checkpoint(KEY, 10, FILES)
        with failing_disk(number), pytest.raises(StorageError) as found:
            save(store)
        assert "No space left on device" in str(found.value)
        assert str(store.root) in found.value.where
        assert "bytes needed" in found.value.what
        assert ".tmp-" not in found.value.where
        verify(before)
        for folder in [*store.root.glob("work/*/*"), *store.root.glob("results/*")]:
            verify(folder)  # whole, also where the rename came through and only its fsync failed
        save(store)  # room returned
        verify(store.checkpoint(KEY) if save is save_checkpoint else store.root / "results" / KEY)


def test_a_lost_note_about_the_holder_does_not_stop_a_lease(store):
    with store.lease(KEY, pytest.fail):
        pass
    with failing_disk(1), store.lease(KEY, pytest.fail):
        assert store.root.joinpath("leases", KEY).stat().st_size < len("process 1234567")


def test_a_read_only_store_is_a_storage_error(store):
    with failing_disk(1, 99, errno.EROFS), pytest.raises(StorageError, match="Read-only file system"):
        store.save_checkpoint(KEY, 1, FILES)
    with (
        failing_disk(1, 99, errno.EROFS),
        pytest.raises(StorageError, match="Read-only"),
        store.lease(KEY, pytest.fail),
    ):
        pass


def test_an_interrupted_commit_leaves_nothing(store, monkeypatch):
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        commit(store.root, "folder", FILES)
    assert not list(store.root.iterdir())


def test_the_names_of_new_folders_are_durable_before_a_commit_returns(store, monkeypatch):
    synced, fsync = set(), os.fsync

    def note(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    folder = store.save_checkpoint(KEY, 1, FILES)
    wanted = {folder.parent, folder.parent.parent, store.root, store.root.parent}
    assert {str(path) for path in wanted} <= synced


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def host():
    return load_plugins()


def interrupt_after(run, steps: int) -> None:
    """Stops a run as a signal would, after so many steps of any stage."""
    seen = []

    def stopped() -> int:
        seen.append(1)
        return 15 if len(seen) > steps else 0

    run.context.stopped = stopped
    with pytest.raises(Interrupted):
        run.execute()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, host):
    """A finished run."""
    root = tmp_path_factory.mktemp("whole")
    make_run(root, host=host, sets=SETS).execute()
    return root


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory, host):
    """A run that was stopped in its second stage with two checkpoints."""
    root = tmp_path_factory.mktemp("broken-off")
    interrupt_after(make_run(root, host=host, sets=SETS), 50)
    assert len(list(root.glob("store/unfinished/*/ckpt-*"))) == 2
    return root


def test_every_flipped_bit_and_every_cut_is_found_and_set_aside(whole, broken_off, tmp_path):
    chance = random.Random(0)
    folders = [next(whole.glob("store/results/*")), sorted(broken_off.glob("store/unfinished/*/ckpt-*"))[-1]]
    for number in range(150):
        part = ("results", "unfinished")[number % 2]
        store = Store(tmp_path / str(number), (warnings := []).append)
        copy = store.root / part / KEY / ("ckpt-00000007" if part == "unfinished" else "")
        shutil.copytree(folders[number % 2], copy)
        how = damage(chance.choice(sorted(copy.iterdir())), chance)
        found = store.result(KEY) if part == "results" else store.checkpoint(KEY)
        assert found is None, how
        assert len(warnings) == 1, how
        assert "set aside" in warnings[0], how
        assert not copy.exists(), how
        assert len(list(copy.parent.glob("damaged-*"))) == 1, how


@pytest.mark.parametrize("name", ["result.json", "student.safetensors", MANIFEST])
def test_a_missing_file_is_found(store, name):
    store.save_result(KEY, RESULT)
    (store.root / "results" / KEY / name).unlink()
    assert store.result(KEY) is None
    assert name in store.warnings[0] or "No such file" in store.warnings[0]


def test_an_unknown_file_is_found(store):
    store.save_result(KEY, RESULT)
    (store.root / "results" / KEY / "teacher.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"unknown files: \['teacher.safetensors'\]"):
        verify(store.root / "results" / KEY)


NEWER = FORMAT + 1


def make_newer(path: Path) -> None:
    body = {**json.loads(path.read_bytes()), "format": NEWER, "compression": "zstd"}
    del body["sha256"]
    path.write_text(json.dumps({**body, "sha256": _seal(body)}))


def test_a_checkpoint_whose_name_came_through_though_its_sync_failed_counts_when_old_ones_are_dropped(tmp_path):
    with failing_disk() as disk:
        Store(tmp_path / "probe").save_checkpoint(KEY, 1, FILES)
        makes_folders = disk.count
        Store(tmp_path / "probe").save_checkpoint(KEY, 2, FILES)
    store = Store(tmp_path / "store")
    for step in (1, 2):
        store.save_checkpoint(KEY, step, FILES)
    with failing_disk(first=disk.count - makes_folders), pytest.raises(StorageError):  # the last: its rename is done
        store.save_checkpoint(KEY, 3, FILES)
    assert len(list((store.root / "unfinished" / KEY).glob("ckpt-*"))) == 3
    assert Store(store.root).save_checkpoint(KEY, 3, FILES) == store.checkpoint(KEY)
    assert len(list((store.root / "unfinished" / KEY).glob("ckpt-*"))) == 2


def test_a_checkpoint_of_a_newer_format_is_not_used_and_is_replaced(store):
    folder = store.save_checkpoint(KEY, 1, FILES)
    make_newer(folder / MANIFEST)
    assert store.checkpoint(KEY) is None
    assert f"format {NEWER}" in store.warnings[0]
    store.save_checkpoint(KEY, 1, FILES)
    assert store.checkpoint(KEY) == folder


def test_a_newer_format_says_so_and_stays(store):
    store.save_result(KEY, RESULT)
    path = store.root / "results" / KEY / MANIFEST
    make_newer(path)
    with pytest.raises(FormatError, match=rf"format {NEWER}, this kdcore reads {FORMAT}.*update"):
        verify(path.parent)
    assert store.result(KEY) is None
    assert f"format {NEWER}" in store.warnings[0]
    assert path.is_file()


def test_what_cannot_be_read_now_is_not_taken_for_damaged(store, monkeypatch):
    store.save_result(KEY, RESULT)

    def refuse(path, *arguments):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StorageError, match="Too many open files"):
            store.result(KEY)
    assert store.result(KEY) == {"key": "a"}


def test_what_another_process_made_again_meanwhile_is_put_back(store):
    store.save_result(KEY, RESULT)
    store._set_aside(store.root / "results" / KEY, DamagedError("seen a moment ago"))
    assert store.result(KEY) == {"key": "a"}
    assert not store.warnings


def test_what_another_process_removes_meanwhile_is_no_damage(store, monkeypatch):
    path = store.save_checkpoint(KEY, 1, FILES)
    monkeypatch.setattr("kdcore.store.verify", lambda folder: (shutil.rmtree(path), verify(folder)))
    assert store.checkpoint(KEY) is None
    assert not store.warnings


def test_checkpoints_are_ordered_by_number(store):
    for step in (99_999_999, 100_000_000, 100_000_001):
        store.save_checkpoint(KEY, step, FILES)
    assert store.checkpoint(KEY).name == "ckpt-100000001"
    assert len(store._checkpoints(KEY)) == 2


def test_a_checkpoint_of_the_same_step_is_not_removed_for_its_successor(store):
    before = store.save_checkpoint(KEY, 1, FILES)
    with failing_disk(1, 99):
        assert store.save_checkpoint(KEY, 1, FILES) == before
    verify(before)


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, broken_off, whole, host, damaged):
    shutil.copytree(broken_off, tmp_path, dirs_exist_ok=True)
    checkpoints = sorted(tmp_path.glob("store/unfinished/*/ckpt-*"))
    for checkpoint in checkpoints[2 - damaged :]:
        damage(checkpoint / "tensors.safetensors", random.Random(damaged))
    run = make_run(tmp_path, host=host, sets=SETS)
    run.execute()
    step = int(checkpoints[0].name.removeprefix("ckpt-")) if damaged == 1 else 0
    assert [event["step"] for event in run.console.kinds("stage_started")] == [step]
    assert sum("set aside" in event["text"] for event in run.console.kinds("warning")) == damaged
    assert weights(tmp_path) == weights(whole)


def test_a_damaged_result_is_trained_again_to_the_same_weights(tmp_path, whole, host):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(next(tmp_path.glob("store/results/*/student.safetensors")), random.Random(1))
    run = make_run(tmp_path, host=host, sets=SETS)
    run.execute()
    assert weights(tmp_path) == weights(whole)
    assert len(run.console.kinds("stage_started")) == 1


def test_a_run_that_met_a_full_disk_goes_on_to_the_same_weights(tmp_path, whole, host):
    with failing_disk() as disk:
        make_run(tmp_path / "probe", host=host, sets=SETS).execute()
    for number in range(2, disk.count, disk.count // 9):
        root = tmp_path / str(number)
        with failing_disk(number, 1000), pytest.raises(StorageError) as found:
            make_run(root, host=host, sets=SETS).execute()
        assert str(root) in found.value.where
        make_run(root, host=host, sets=SETS).execute()
        assert weights(root) == weights(whole)
