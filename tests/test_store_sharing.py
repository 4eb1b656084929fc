"""Several processes and machines share a store: leases, cleaning, packing."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager

import pytest
from faults import damage, failing

from kdcore.archive import INDEX
from kdcore.errors import StorageError
from kdcore.folders import verify
from kdcore.plan import canonical
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
    for name in (f"results/.tmp-1-{THIRD}", f"results/damaged-1-{THIRD}", f"work/{THIRD}/damaged-1-ckpt-00000002"):
        (store.root / name).mkdir(parents=True)


def names(store: Store) -> list[str]:
    found = [*store.root.glob("results/*"), *store.root.glob("work/*"), *store.root.glob("work/*/*")]
    return sorted(path.relative_to(store.root).as_posix() for path in found)


def test_gc_keeps_what_is_named_and_the_checkpoints_of_unfinished_stages(store):
    fill(store)
    removed = store.collect({KEY, THIRD})
    assert names(store) == [f"results/{KEY}", f"work/{THIRD}", f"work/{THIRD}/ckpt-00000001"]
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
            f"work/{THIRD}", f"work/{THIRD}/ckpt-00000001", f"work/{THIRD}/damaged-1-ckpt-00000002",
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


# ---------------------------------------------------------------- packing


@pytest.fixture
def packed(store, tmp_path):
    for key in (KEY, OTHER, THIRD):
        store.save_result(key, {**FILES, "teacher.safetensors": os.urandom(3000)})
    store.pack(tmp_path / "results.tar", store.stored())
    return tmp_path / "results.tar"


def refuses(target: Store, source, what: str) -> None:
    before = names(target)
    with pytest.raises(StorageError, match=what) as found:
        target.unpack(source)
    assert str(source) in found.value.where
    assert names(target) == before


def test_pack_and_unpack_give_the_same_results(store, packed, tmp_path):
    other = Store(tmp_path / "other")
    other.save_result(OTHER, FILES)
    assert other.unpack(packed) == [KEY, THIRD]
    assert other.unpack(packed) == []
    for key in (KEY, THIRD):
        verify(other.root / "results" / key)
        for path in (store.root / "results" / key).iterdir():
            assert (other.root / "results" / key / path.name).read_bytes() == path.read_bytes()
    assert other.result(OTHER) == {"key": "a"}
    assert names(other) == [f"results/{key}" for key in (KEY, OTHER, THIRD)]


def test_unpack_takes_every_result_or_none(store, packed, tmp_path):
    damage(store.root / "results" / THIRD / "teacher.safetensors", random.Random(0))
    with tarfile.open(packed, "w") as tar:
        add(tar, INDEX, canonical({"format": 1, "keys": [KEY, THIRD]}).encode())
        for key in (KEY, THIRD):
            tar.add(store.root / "results" / key, arcname=key)
    refuses(Store(tmp_path / "other"), packed, "not a whole pack: the content is not what was written")


def test_a_cut_pack_is_refused_wherever_it_is_cut(packed, tmp_path):
    data = packed.read_bytes()
    chance = random.Random(0)
    used = 512 * (len(data.rstrip(b"\0")) // 512 + 1)
    with tarfile.open(packed) as tar:
        members = [member.offset for member in tar.getmembers()]  # tarfile takes a cut there for the end
    for cut in [0, 1, 511, *members, *(chance.randrange(used) for _ in range(30))]:
        packed.write_bytes(data[:cut])
        refuses(Store(tmp_path / "other"), packed, "not a whole pack")


def test_a_pack_with_flipped_bits_is_refused_or_gives_sound_results(packed, tmp_path):
    data, chance = packed.read_bytes(), random.Random(0)
    for number in range(60):
        packed.write_bytes(data)
        how = damage(packed, chance)
        other = Store(tmp_path / str(number))
        try:
            other.unpack(packed)
        except StorageError:
            assert names(other) == [], how
        for key in other.stored():
            verify(other.root / "results" / key)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname = len(data), kind, link
    tar.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../outside", tarfile.REGTYPE, ""),
        ("/tmp/outside", tarfile.REGTYPE, ""),
        (f"{KEY}/../../outside", tarfile.REGTYPE, ""),
        (f"{KEY}/..", tarfile.DIRTYPE, ""),
        (f"{KEY}/deeper/file", tarfile.REGTYPE, ""),
        (f"{KEY}/link", tarfile.SYMTYPE, "../../../outside"),
        (f"{KEY}/link", tarfile.LNKTYPE, f"{OTHER}/result.json"),
        (f"{KEY}/pipe", tarfile.FIFOTYPE, ""),
        (KEY, tarfile.SYMTYPE, OTHER),
        ("notes.txt", tarfile.REGTYPE, ""),
    ],
)
def test_unpack_refuses_what_pack_does_not_write(packed, tmp_path, name, kind, link):
    with tarfile.open(packed, "a") as tar:
        add(tar, name, b"x" if kind == tarfile.REGTYPE else b"", kind, link)
    refuses(Store(tmp_path / "other"), packed, "does not belong in a pack")
    assert not list(tmp_path.rglob("outside"))


def test_a_file_that_is_no_pack_is_refused(tmp_path):
    other = Store(tmp_path / "other")
    (tmp_path / "text").write_text("no tar")
    refuses(other, tmp_path / "text", "not a whole pack")
    refuses(other, tmp_path / "missing", "No such file")
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        add(tar, "notes.txt")
    refuses(other, tmp_path / "foreign.tar", f"does not begin with {INDEX}")


def test_a_pack_of_a_newer_format_says_so(tmp_path):
    with tarfile.open(tmp_path / "new.tar", "w") as tar:
        add(tar, INDEX, b'{"format": 2, "keys": []}')
    refuses(Store(tmp_path / "other"), tmp_path / "new.tar", "format 2, this kdcore reads 1")


def test_a_damaged_result_is_not_packed(store, packed, tmp_path):
    before = packed.read_bytes()
    damage(store.root / "results" / KEY / "result.json", random.Random(0))
    with pytest.raises(StorageError):
        store.pack(packed, [KEY])
    assert packed.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"store", "results.tar"}


def test_a_full_disk_while_unpacking_leaves_nothing_half(packed, tmp_path):
    with failing() as disk:
        Store(tmp_path / "probe").unpack(packed)
    for number in range(1, disk.count + 1):
        other = Store(tmp_path / str(number))
        with failing(number, 99), pytest.raises(StorageError):
            other.unpack(packed)
        for path in other.root.glob("results/*"):
            verify(path)
        other.unpack(packed)
        assert len(other.stored()) == 3


def test_a_store_that_cannot_be_written_refuses_a_pack(packed, tmp_path):
    with failing(1, 99, errno.EROFS), pytest.raises(StorageError, match="Read-only"):
        Store(tmp_path / "other").unpack(packed)
