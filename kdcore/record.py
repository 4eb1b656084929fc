"""What a run leaves for other tools: metrics.jsonl, live, and curves.csv, from the results. docs/observing.md has both.

Neither is needed to go on with a run, so neither is fsync'd line by line, and a disk that takes no more of them does
not end it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import StorageError
from .files import make_folder, replace_file
from .job import Event
from .locks import lock, lock_file

METRICS, CURVES = "metrics.jsonl", "curves.csv"
COLUMNS = ("stage", "key", "seed", "member", "tick", "epoch", "metric", "value")
BLOCK = 65536


class Record:
    """Writes both files of a run's folder.

    Args:
        folder: the run's.
        complain: told once of what could not be written.
    """

    def __init__(self, folder: Path, complain: Callable[[str], None]) -> None:
        self.folder, self.complain = folder, complain
        self.complained = False

    def begin(self) -> None:
        """Notes that a process begins, or goes on with, the run."""
        self._append([{"time": _time(), "kind": "run"}])

    def event(self, event: Event) -> None:
        """Appends the lines of an event; most kinds have none."""
        head = {"time": _time(), "kind": "", "stage": event.get("name", ""), "key": event.get("key", "")}
        self._append([{**head, **line} for line in _lines(event)])

    def curves(self, results: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Writes curves.csv anew from (stage's name, its entry in result.json), unless it says that already."""
        path, data = self.folder / CURVES, _table(results)
        try:
            if not path.is_file() or path.read_bytes() != data:
                replace_file(path, data)
        except (OSError, StorageError) as error:
            self._missed(error)

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        try:
            make_folder(self.folder)
            with lock_file(self.folder / METRICS) as handle:
                lock(handle)
                _write(handle, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        except (OSError, StorageError) as error:
            self._missed(error)

    def _missed(self, error: Exception) -> None:
        if not self.complained:
            self.complained = True
            self.complain(f"{METRICS} or {CURVES} could not be written ({error}); the run goes on without")


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that still count, oldest first.

    A torn last line is passed over; so is what a stage said of steps that it did again after a kill. No file, no lines.
    """
    try:
        *lines, _ = (folder / METRICS).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    counting: list[dict[str, Any]] = []
    for text in lines:
        with suppress(ValueError, TypeError, KeyError):  # what a power cut left of a line
            line = json.loads(text)
            if line["kind"] == "start":
                counting = [old for old in counting if not _undone(old, line)]
            counting.append(line)
    return counting


def _undone(old: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    return bool(old.get("key") == start["key"] and old.get("step", -1) > start["step"])


def _lines(event: Event) -> Iterator[dict[str, Any]]:
    kind = event["kind"]
    if kind == "log":
        members: dict[str, dict[str, float]] = {}
        for name, value in event["metrics"].items():  # "student.kd", and "images_per_second" of the stage
            member, dot, metric = name.partition(".")
            member, metric = (member, metric) if dot else ("", member)
            members.setdefault(member, {})[metric] = value
        yield from ({"kind": kind, "step": event["step"], "member": m, "values": v} for m, v in members.items())
    elif kind == "tick":
        where = {"kind": kind, **{name: event[name] for name in ("step", "tick", "ticks")}}
        yield from ({**where, "member": member, "values": row} for member, row in event["metrics"].items())
    elif kind == "stage_started":
        yield {"kind": "start", **{name: event[name] for name in ("step", "tick", "ticks", "every")}}
    elif kind == "decision":
        yield {"kind": kind, "step": event["event"]["step"], "values": event["event"]}
    elif kind == "choice":
        yield {"kind": kind, "text": event["text"], "margin": event["margin"], "error": event["error"]}
    elif kind == "warning":
        yield {"kind": kind, "text": event["text"]}


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _write(handle: int, data: bytes) -> None:
    """Appends after the last whole line; a kill or a full disk may have cut the one behind it."""
    end = _whole(handle)
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(handle, data[done:], end + done)
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, end)
        raise


def _whole(handle: int) -> int:
    """Bytes of whole lines; what is behind them is cut off."""
    end = size = os.fstat(handle).st_size
    while end:
        start = max(0, end - BLOCK)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        end = start if found < 0 else start + found + 1
        if found >= 0:
            break
    if end < size:
        os.ftruncate(handle, end)
    return end


def _table(results: Iterable[tuple[str, Mapping[str, Any]]]) -> bytes:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for stage, result in results:
        for name, member in sorted(result["members"].items()):  # the store's JSON is sorted, a new result is not
            for row in member["curve"]:
                where = (stage, result["key"], result["seed"], name, row["tick"], row["epoch"])
                values = [(metric, row[metric]) for metric in sorted(row.keys() - {"tick", "epoch"})]
                table.writerows((*where, *value) for value in values)
    return out.getvalue().encode(errors="replace")
