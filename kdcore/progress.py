"""How far a run is, from its files alone: of one that goes on in another process, or that was killed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .errors import StorageError
from .files import storing
from .journal import Journal
from .plan import Json
from .reading import read_table
from .record import METRICS, read
from .store import Store

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class StageProgress:
    """A stage that the run asked for or trains.

    Args:
        key: its content key.
        name: for people.
        state: "waiting", "running", "finished" or "reused"; one that was killed is still "running".
        tick: ticks that are over.
        ticks: of the whole stage; 0 while that is not known.
        seconds: what training took; None before its end.
        result: as the figures of a report want it: the stored result, or its members' curves so far.
        losses: member -> (step, mean loss since the log point before).
    """

    key: str
    name: str
    state: str
    tick: int
    ticks: int
    seconds: float | None
    result: Mapping[str, Any]
    losses: Mapping[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Progress:
    """A run that is not finished. Times are ISO 8601, UTC; ``seconds`` leaves out the time between two processes;
    ``choices`` (text, margin, error) are those of the latest process, which makes the earlier ones' again.
    """

    run: str
    begun: str
    latest: str
    seconds: float
    warnings: tuple[str, ...]
    choices: tuple[Mapping[str, Any], ...]
    stages: tuple[StageProgress, ...]


def is_finished(folder: Path) -> bool:
    """True if result.json is of the last process that began, or went on with, the run.

    Raises:
        StorageError: there is one, but not of kdcore: a run replaces it whole.
    """
    path = folder / "result.json"
    try:
        finished = str(read_table(path)["run"]["finished"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "kdcore resume the run: it writes it again."
        raise StorageError(f"no result of kdcore: {error!r}", where=str(path), fix=fix) from error
    begun = [line["time"] for line in read(folder) if line["kind"] == "run"]
    return not begun or finished[:19] >= begun[-1][:19]  # whole seconds: result.json has no others


def state_of(folder: Path) -> tuple[Any, ...]:
    """Equal for two looks between which nothing was written."""
    files = [folder / name for name in (METRICS, "journal.jsonl", "result.json")]
    return tuple((about.st_mtime_ns, about.st_size) for about in (f.stat() for f in files if f.exists()))


def look(folder: Path, results: dict[str, dict[str, Any]]) -> Progress:
    """Reads journal, metrics.jsonl and the results of finished stages.

    Args:
        folder: of the run.
        results: key -> stored result; those that are missing are read, with all that verifying them costs, and added.

    Raises:
        StorageError: the journal or run.json cannot be read.
    """
    journal, lines, store = Journal(folder / "journal.jsonl"), read(folder), _store(folder / "run.json")
    ended = {record["key"]: record for record in journal.of("result")}
    sessions = _sessions(lines)
    begun = {line["key"] for session in sessions[-1:] for line in session if line["kind"] == "start"}
    stages = []
    for key, name in _asked(journal, begun).items():
        if key in ended and key not in results and (stored := store.result(key)) is not None:
            results[key] = stored
        if key not in results:
            stages.append(_unfinished(key, name, [line for line in lines if line.get("key") == key], key in begun))
        else:
            stages.append(_finished(key, name, results[key], ended[key]["reused"]))
    return Progress(
        run=folder.resolve().name,
        begun=lines[0]["time"] if lines else "",
        latest=lines[-1]["time"] if lines else "",
        seconds=sum(_seconds(session[0], session[-1]) for session in sessions),
        warnings=tuple(dict.fromkeys(_warning(line) for line in lines if line["kind"] == "warning")),
        choices=tuple(line for session in sessions[-1:] for line in session if line["kind"] == "choice"),
        stages=tuple(stages),
    )


def _store(path: Path) -> Store:
    with storing(path):
        try:
            saved = read_table(path)
            return Store(Path(saved["cwd"], saved["store"]))
        except (ValueError, KeyError, TypeError) as error:
            fix = "Run the recipe again: it writes this file anew."
            raise StorageError(f"no run of kdcore: {error!r}", where=str(path), fix=fix) from error


def _asked(journal: Journal, begun: set[str]) -> dict[str, str]:
    """Key -> name: what is finished or was begun by the latest process, then what else the strategy asked for last."""
    found: dict[str, str] = {}
    for record in journal.records:
        if record["kind"] == "result" or (record["kind"] == "start" and record["key"] in begun):
            found.setdefault(record["key"], record["name"])
    last = {record["number"]: record for record in journal.of("ask")}
    for record in last.values():
        for key, name in zip(record["keys"], record["names"], strict=True):
            found.setdefault(key, name)
    return found


def _finished(key: str, name: str, result: Mapping[str, Any], reused: bool) -> StageProgress:
    state, ticks = "reused" if reused else "finished", result["ticks"]
    return StageProgress(key, name, state, ticks, ticks, result["seconds"], {**result, "name": name, "uses": {}}, {})


def _unfinished(key: str, name: str, own: Lines, running: bool) -> StageProgress:
    state = "running" if running else "waiting"
    return StageProgress(key, name, state, *_ticks(own), None, _so_far(key, name, own), _losses(own))


def _ticks(own: Lines) -> tuple[int, int]:
    counted = [line for line in own if line["kind"] in ("start", "tick")]
    return (counted[-1]["tick"], counted[-1]["ticks"]) if counted else (0, 0)


def _so_far(key: str, name: str, own: Lines) -> dict[str, Json]:
    members: dict[str, dict[str, Json]] = {}
    for line in own:
        if line["kind"] == "tick":
            member = members.setdefault(line["member"], {"model": "", "trained": True, "curve": []})
            member["curve"].append(line["values"])
    every = next((line["every"] for line in own if line["kind"] == "start"), "epoch")
    events = [line["values"] for line in own if line["kind"] == "decision"]
    return {"key": key, "name": name, "tick": every, "members": members, "events": events, "uses": {}}


def _losses(own: Lines) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in own:
        if line["kind"] == "log" and "loss" in line["values"]:
            found.setdefault(line["member"], []).append((line["step"], line["values"]["loss"]))
    return found


def _warning(line: Mapping[str, Any]) -> str:
    return f"{line['stage']}: {line['text']}" if line["stage"] else str(line["text"])


def _sessions(lines: Lines) -> list[Lines]:
    """The lines of each process, whose first is that it began."""
    sessions: list[Lines] = []
    for line in lines:
        if line["kind"] == "run" or not sessions:
            sessions.append([])
        sessions[-1].append(line)
    return sessions


def _seconds(first: Mapping[str, Any], last: Mapping[str, Any]) -> float:
    begun, ended = (datetime.fromisoformat(line["time"]) for line in (first, last))
    return (ended - begun).total_seconds()
