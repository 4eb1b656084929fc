"""What a replay reads of a run's journal: what was asked for and chosen, and which of it the strategy must repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import StorageError
from .journal import FIX, Journal

READ = {
    "run": {"plugins", "code"},
    "ask": {"number", "names", "plan", "keys"},
    "result": {"key", "curves", "seconds"},
}


def open_journal(path: Path) -> Journal:
    """The journal of a run, with the fields that a replay reads.

    Raises:
        StorageError: a record lacks one.
    """
    journal = Journal(path)
    for record in journal.records:
        if missing := READ.get(record["kind"], set()) - record.keys():
            raise StorageError(f"a record {record['kind']!r} without {min(missing)!r}", where=str(path), fix=FIX)
    return journal


def last(journal: Journal, kind: str, number: int) -> dict[str, Any] | None:
    """The newest record of a kind that has this number."""
    found = (record for record in reversed(journal.records) if record["kind"] == kind)
    return next((record for record in found if record.get("number") == number), None)


def first_binding(records: Sequence[Mapping[str, Any]]) -> int:
    """Index of the first record whose asks a replay must repeat.

    A run, an ask or a result that is there again says that code, data or a result changed: asks before it bind nobody.
    """
    seen, first = set[tuple[Any, ...]](), 0
    for index, record in enumerate(records):
        if record["kind"] in READ:
            what = (record["kind"], str(record.get("number")), record.get("key"))
            first = index if what in seen else first
            seen.add(what)
    return first
