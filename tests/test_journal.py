"""What was journalled stays, and nothing else is read."""

from __future__ import annotations

import errno
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcore.errors import StorageError
from kdcore.journal import Journal, _line
from kdcore.testing.faults import failing_disk

RECORDS = [{"kind": "ask", "number": n, "keys": [f"{n:064x}"], "names": ["é"]} for n in range(3)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "journal.jsonl"


def written(path) -> Journal:
    journal = Journal(path)
    for record in RECORDS:
        journal.append(record)
    return journal


def test_a_journal_gives_back_its_records(path):
    assert written(path).records == Journal(path).records == RECORDS
    assert [record["number"] for record in Journal(path).of("ask")] == [0, 1, 2]


def test_opening_changes_nothing(path, monkeypatch):
    with failing_disk(1, 99, errno.EROFS):
        assert Journal(path).records == []
    written(path)
    with path.open("ab") as file:
        file.write(b"torn")
    before = path.read_bytes()
    assert Journal(path).records == RECORDS
    assert path.read_bytes() == before


def test_a_torn_last_line_is_cut_off_before_the_next_append(path):
    written(path)
    for cut in (1, 5, 20):
        path.write_bytes(path.read_bytes()[:-cut])
        journal = Journal(path)
        assert journal.records == RECORDS[:2]
        journal.append(RECORDS[2])
        assert Journal(path).records == RECORDS


record = st.fixed_dictionaries({"kind": st.text(), "value": st.recursive(st.integers() | st.text(), st.lists)})


@given(st.lists(record, max_size=5), st.data())
def test_every_prefix_of_a_journal_reads_as_a_prefix_of_its_records(tmp_path_factory, records, data):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    text = b"".join(_line(record) for record in records)
    cut = data.draw(st.integers(0, len(text)))
    path.write_bytes(text[:cut])
    journal = Journal(path)
    assert journal.records == records[: text[:cut].count(b"\n")]
    journal.append({"kind": "next"})
    assert Journal(path).records == [*journal.records[:-1], {"kind": "next"}]


def test_damage_in_the_middle_says_what_to_do(path):
    written(path)
    text = path.read_bytes()
    chance = random.Random(0)
    for _ in range(200):
        data = bytearray(text)
        place = chance.randrange(text.rindex(b"\n", 0, -1))
        data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(StorageError, match=r"line [12] is damaged. Move the run's folder away and run again") as e:
            Journal(path)
        assert e.value.where == str(path)
        assert e.value.exit_code == 4


def test_a_full_disk_leaves_the_journal_as_it_was(path):
    journal = written(path)
    for number in (1, 2):  # the write, its fsync
        with (
            failing_disk(number),
            pytest.raises(StorageError, match=r"No space left on device \(\d+ bytes needed\)") as e,
        ):
            journal.append({"kind": "result"})
        assert e.value.where == str(path)
        assert journal.records == Journal(path).records == RECORDS
    journal.append({"kind": "result"})
    assert Journal(path).records == [*RECORDS, {"kind": "result"}]


def test_a_folder_that_cannot_be_written_is_a_storage_error(path):
    with failing_disk(1, 99, errno.EROFS), pytest.raises(StorageError, match="Read-only file system"):
        Journal(path).append({"kind": "run"})


def test_a_folder_in_the_place_of_a_journal_is_a_storage_error(path):
    path.mkdir(parents=True)
    with pytest.raises(StorageError, match="Is a directory"):
        Journal(path)


def test_two_processes_lose_none_of_each_others_records(path):
    first, second = Journal(path), Journal(path)
    for number in range(4):
        (first, second)[number % 2].append({"kind": "ask", "number": number})
    assert [record["number"] for record in second.records] == [0, 1, 2, 3]
    assert Journal(path).records == second.records


def test_the_torn_line_of_a_killed_process_does_not_spoil_what_another_appends(path):
    first = written(path)
    with path.open("ab") as file:
        file.write(_line({"kind": "lost"})[:-3])
    first.append({"kind": "next"})
    assert Journal(path).records == [*RECORDS, {"kind": "next"}]


def test_a_journal_that_is_cut_under_a_running_process_is_an_error(path):
    journal = written(path)
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="cut or replaced"):
        journal.append({"kind": "next"})


def test_a_record_and_the_name_of_its_file_are_durable_when_append_returns(path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    journal = Journal(path)
    journal.append({"kind": "run"})
    assert synced == [str(path.parent.parent), str(path), str(path.parent)]
    journal.append({"kind": "ask"})
    assert synced[3:] == [str(path)]


def test_every_key_that_a_record_names_is_known(path):
    journal = Journal(path)
    for record in ({"kind": "run"}, {"kind": "ask", "keys": ["a", "b"]}, {"kind": "start", "key": "c"}):
        journal.append(record)
    assert Journal(path).keys() == {"a", "b", "c"}
