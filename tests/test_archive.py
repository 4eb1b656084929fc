"""Results go from one store to another as one file: all of them sound, or none."""

from __future__ import annotations

import errno
import io
import os
import random
import tarfile

import pytest

from kdcore.archive import INDEX
from kdcore.codec import canonical
from kdcore.errors import StorageError
from kdcore.folders import FORMAT, verify
from kdcore.store import Store
from kdcore.testing.faults import damage, failing_disk

KEY, OTHER, THIRD = "a" * 64, "b" * 64, "c" * 64
FILES = {"result.json": b'{"key": "a"}', "student.safetensors": bytes(range(256)) * 8}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def names(store: Store) -> list[str]:
    found = [*store.root.glob("results/*"), *store.root.glob("unfinished/*"), *store.root.glob("unfinished/*/*")]
    return sorted(path.relative_to(store.root).as_posix() for path in found)


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


def test_an_unpacked_result_needs_its_checkpoints_no_longer(packed, tmp_path):
    other = Store(tmp_path / "other")
    other.save_checkpoint(KEY, 5, FILES)
    other.unpack(packed)
    assert not list((other.root / "unfinished").iterdir())


def test_checkpoints_of_a_key_that_is_trained_just_now_stay_until_that_ends(packed, tmp_path):
    other = Store(tmp_path / "other")
    other.save_checkpoint(KEY, 5, FILES)
    with other.lease(KEY, lambda holder: None):
        other.unpack(packed)
        assert other.checkpoint(KEY)
        other.save_result(KEY, FILES)
    assert not list((other.root / "unfinished").iterdir())


def test_a_checkpoint_goes_to_another_store_and_no_bit_of_it_changes_unnoticed(store, tmp_path):
    other = Store(tmp_path / "other")
    assert store.carried(KEY) is None
    for step in (9, 123_456_789):
        store.save_checkpoint(KEY, step, FILES)
    step, files = store.carried(KEY)
    chance = random.Random(0)
    for name, data in files.items():
        place = chance.randrange(len(data))
        changed = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        for wrong in ({**files, name: changed}, {n: d for n, d in files.items() if n != name}):
            with pytest.raises(StorageError, match="not what was written"):
                other.adopt_checkpoint(KEY, step, wrong)
    assert not names(other)
    path = other.adopt_checkpoint(KEY, step, files)
    assert path.name == "ckpt-123456789"
    assert other.checkpoint(KEY) == path
    assert {name: (path / name).read_bytes() for name in FILES} == FILES


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
        add(tar, INDEX, canonical({"format": FORMAT, "keys": [KEY, THIRD]}).encode())
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
        add(tar, INDEX, canonical({"format": FORMAT + 1, "keys": []}).encode())
    refuses(Store(tmp_path / "other"), tmp_path / "new.tar", f"format {FORMAT + 1}, this kdcore reads {FORMAT}")


def test_a_damaged_result_is_not_packed(store, packed, tmp_path):
    before = packed.read_bytes()
    damage(store.root / "results" / KEY / "result.json", random.Random(0))
    with pytest.raises(StorageError):
        store.pack(packed, [KEY])
    assert packed.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"store", "results.tar"}


def test_a_full_disk_while_unpacking_leaves_nothing_half(packed, tmp_path):
    with failing_disk() as disk:
        Store(tmp_path / "probe").unpack(packed)
    for number in range(1, disk.count + 1):
        other = Store(tmp_path / str(number))
        with failing_disk(number, 99), pytest.raises(StorageError):
            other.unpack(packed)
        for path in other.root.glob("results/*"):
            verify(path)
        other.unpack(packed)
        assert len(other.stored()) == 3


def test_a_store_that_cannot_be_written_refuses_a_pack(packed, tmp_path):
    with failing_disk(1, 99, errno.EROFS), pytest.raises(StorageError, match="Read-only"):
        Store(tmp_path / "other").unpack(packed)
