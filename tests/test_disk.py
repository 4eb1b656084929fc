"""Whatever the disk does to what is stored: it is whole and sound, or it is not loaded, and the run goes on."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file
from small import make_run, weights

from kdcore.errors import StorageError
from kdcore.folders import verify
from kdcore.journal import Journal
from kdcore.plugins import load_plugins
from kdcore.store import KEPT_CHECKPOINTS, Store
from kdcore.testing.faults import damage, failing_disk

SETS = ("execute.checkpoint_seconds=0",)
KEYS = [character * 64 for character in "ab"]
DELIVERED = ("run.json", "result.json", "student.safetensors", "report.html", "journal.jsonl")


@pytest.fixture(scope="module")
def host():
    return load_plugins()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, host) -> Path:
    root = tmp_path_factory.mktemp("whole")
    make_run(root, host=host, sets=SETS).execute()
    return root


# ---------------------------------------------------------------- a full disk


def check_folder(root: Path) -> None:
    """What is there under its name is whole."""
    run = root / "run"
    for name in ("run.json", "result.json"):
        assert not (run / name).exists() or json.loads((run / name).read_bytes())
    if (run / "student.safetensors").exists():
        assert load_file(run / "student.safetensors")
    if (run / "report.html").exists():
        assert (run / "report.html").read_text().rstrip().endswith("</html>")
    assert not list(root.rglob(".tmp-*"))
    for folder in [*root.glob("store/results/*"), *root.glob("store/unfinished/*/*")]:
        verify(folder)
    Journal(run / "journal.jsonl")


def test_a_full_disk_while_a_run_is_delivered_leaves_what_was_there(tmp_path, whole, host):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with failing_disk() as disk:
        make_run(tmp_path, host=host, sets=SETS).execute()
    assert disk.count >= 12
    before = {name: (tmp_path / "run" / name).read_bytes() for name in DELIVERED}
    for number in range(1, disk.count + 1):
        with failing_disk(number, 1000), pytest.raises(StorageError, match="No space left on device") as found:
            make_run(tmp_path, host=host, sets=SETS).execute()
        assert found.value.exit_code == 4
        assert str(tmp_path) in found.value.where
        check_folder(tmp_path)
        now = {name: (tmp_path / "run" / name).read_bytes() for name in DELIVERED}
        assert [now[name] for name in ("run.json", "student.safetensors", "journal.jsonl")] == [
            before[name] for name in ("run.json", "student.safetensors", "journal.jsonl")
        ]
    assert make_run(tmp_path, host=host, sets=SETS).execute()["student"]


@pytest.mark.long
def test_a_full_disk_at_any_operation_of_a_whole_run_is_a_storage_error_and_the_run_goes_on(tmp_path, whole, host):
    with failing_disk() as disk:
        make_run(tmp_path / "probe", host=host, sets=SETS).execute()
    assert disk.count > 60
    for number in range(1, disk.count + 1):
        root, length = tmp_path / str(number), (3, 1000)[number % 2]  # room returns, or does not
        try:
            with failing_disk(number, length):
                make_run(root, host=host, sets=SETS).execute()
        except StorageError:
            pass
        else:  # what only people read is no reason to end: records in the middle, and what comes last
            assert length == 3 or number > disk.count - 6
        check_folder(root)
        make_run(root, host=host, sets=SETS).execute()
        assert weights(root) == weights(whole), number
        shutil.rmtree(root)


# ---------------------------------------------------------------- flipped bits and cuts


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.long)])
def test_no_damage_is_loaded_and_the_last_good_one_is_taken(tmp_path, whole, host, count):
    chance = random.Random(count)
    files = {path.name: path.read_bytes() for path in next(whole.glob("store/results/*")).iterdir()}
    del files["MANIFEST.json"]
    journal = (whole / "run/journal.jsonl").read_bytes()
    records = Journal(whole / "run/journal.jsonl").records
    loaded = 0
    for number in range(count):
        store = Store(tmp_path / str(number), (warnings := []).append)
        store.save_result(KEYS[0], files)
        good, newest = (store.save_checkpoint(KEYS[1], step, files) for step in (1, 2))
        result = store.root / "results" / KEYS[0]
        how = (
            damage(chance.choice(sorted(result.iterdir())), chance),
            damage(chance.choice([*newest.iterdir()]), chance),
        )
        loaded += (store.result(KEYS[0]) is not None) + (store.checkpoint(KEYS[1]) != good)
        assert len(warnings) == 2, how
        path = store.root / "journal.jsonl"
        path.write_bytes(journal)
        damage(path, chance)
        loaded += not is_refused_or_cut(path, records)
        shutil.rmtree(store.root)
    assert loaded == 0, f"{loaded} of {3 * count} damaged ones were loaded"


def is_refused_or_cut(path: Path, records: list[dict]) -> bool:
    """A damaged journal is an error; one that lost its end, as by a crash, is what it was before."""
    try:
        found = Journal(path).records
    except StorageError:
        return True
    return found == records[: len(found)] and len(found) < len(records)


# ---------------------------------------------------------------- any order of anything


class Disk(RuleBasedStateMachine):
    """Journal and store against a model of what was acknowledged, on a disk that fails and with processes that die."""

    @initialize(folder=st.uuids())
    def begin(self, folder):
        import tempfile

        self.root = Path(tempfile.mkdtemp(prefix=f"disk-{folder.hex[:6]}-"))
        self.records: list[dict] = []  # acknowledged
        self.results: dict[str, bytes] = {}
        self.steps: dict[str, list[int]] = {key: [] for key in KEYS}
        self.number = 0
        self.crash()

    @rule()
    def crash(self):
        """A fresh process looks at what is there."""
        self.warnings: list[str] = []
        self.store, self.journal = Store(self.root, self.warnings.append), Journal(self.root / "run/journal.jsonl")

    def content(self, key: str) -> dict[str, bytes]:
        return {"result.json": json.dumps({"key": key}).encode(), "student.safetensors": key.encode() * 9}

    def attempt(self, first: int, length: int, action) -> bool:
        """True if the action was acknowledged; else a process that met a full disk is gone."""
        try:
            with failing_disk(first, length):
                action()
        except StorageError:
            self.crash()
            return False
        return True

    fault = st.just(0) | st.integers(1, 12)  # half of the time nothing fails
    length = st.sampled_from([1, 2, 99])

    @rule(first=fault, length=length, key=st.sampled_from(KEYS))
    def append(self, first, length, key):
        self.number += 1
        record = {"kind": "start", "key": key, "name": "n", "step": self.number}
        before = len(self.journal.records)
        if self.attempt(first, length, lambda: self.journal.append(record)):
            self.records.append(record)
        elif len(self.journal.records) > before:
            self.records.append(record)  # it came through; only its acknowledgement did not
            assert self.journal.records[-1] == record

    @rule(first=fault, length=length, key=st.sampled_from(KEYS))
    def save_result(self, first, length, key):
        if self.attempt(first, length, lambda: self.store.save_result(key, self.content(key))):
            self.results[key] = self.content(key)["student.safetensors"]
            self.steps[key].clear()  # a result needs no checkpoints

    @rule(first=fault, length=length, key=st.sampled_from(KEYS), step=st.integers(1, 9))
    def save_checkpoint(self, first, length, key, step):
        newer = max(self.steps[key], default=0) + step
        if self.attempt(first, length, lambda: self.store.save_checkpoint(key, newer, self.content(f"{key}{newer}"))):
            self.steps[key].append(newer)
        if not first:
            assert len(self.store._checkpoints(key)) <= KEPT_CHECKPOINTS

    @rule(key=st.sampled_from(KEYS), seed=st.integers(0, 99))
    def damage_result(self, key, seed):
        folder = self.root / "results" / key
        if folder.is_dir():
            chance = random.Random(seed)
            damage(chance.choice(sorted(folder.iterdir())), chance)
            assert self.store.result(key) is None
            self.results.pop(key, None)

    @precondition(lambda self: hasattr(self, "journal"))
    @rule(first=fault, length=length)
    def collect(self, first, length):
        needed = self.journal.keys()
        for key in self.store.stored():
            self.steps[key].clear()
        self.attempt(first, length, lambda: self.store.collect(needed))
        for key in KEYS:
            if key not in needed:
                self.results.pop(key, None)
                self.steps[key].clear()

    @invariant()
    def what_was_acknowledged_is_there(self):
        if not hasattr(self, "journal"):
            return
        assert Journal(self.root / "run/journal.jsonl").records == self.journal.records == self.records
        fresh = Store(self.root, pytest.fail)
        for key, student in self.results.items():
            assert fresh.result(key) == {"key": key}
            assert (self.root / "results" / key / "student.safetensors").read_bytes() == student
        for key, steps in self.steps.items():
            if steps and key not in self.results and fresh.result(key) is None:
                found = fresh.checkpoint(key)
                assert found is not None
                assert int(found.name[5:]) >= steps[-1]

    @invariant()
    def what_verifies_was_saved_whole(self):
        if not hasattr(self, "journal"):
            return
        for key in KEYS:
            if Store(self.root).result(key) is not None:
                verify(self.root / "results" / key)
            folders = Store(self.root)._checkpoints(key)
            for folder in folders:
                verify(folder)
                step = int(folder.name[5:])
                assert json.loads((folder / "result.json").read_bytes()) == {"key": f"{key}{step}"}

    def teardown(self):
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


TestDisk = Disk.TestCase
TestDisk.settings = settings(max_examples=12, stateful_step_count=30, suppress_health_check=list(HealthCheck))


@pytest.mark.long
class TestDiskLong(Disk.TestCase):
    settings = settings(max_examples=400, stateful_step_count=40, suppress_health_check=list(HealthCheck))
