"""What the tables of accuracies share: figures with their spread, Markdown and JSON, and the check against runs."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcore.compare import CONFIDENCE
from kdcore.compare import interval as interval_of
from kdcore.errors import StorageError
from kdcore.store import Store

Table = Mapping[str, Any]

MEASURES = {
    "test": "test_accuracy_last",
    "test_at_best": "test_accuracy_at_best",
    "monitor": "monitor_accuracy_last",
    "best_monitor": "best_monitor_accuracy",
}
MEASURED = ("members", "flops", "events", "seconds", "member_seconds", "environment")
"""Of a stage, what the store says too."""
PLACES = {"root", "download"}  # where data lies says nothing of a result


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n values, and the mean's 95 % interval by Student's t; None below two."""

    mean: float
    n: int
    sd: float | None
    low: float | None
    high: float | None


def spread(values: Iterable[float]) -> Spread | None:
    """None of no values."""
    found = list(values)
    if not found:
        return None
    sd = statistics.stdev(found) if len(found) > 1 else None
    return Spread(statistics.fmean(found), len(found), sd, *interval_of(found))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """Ours less theirs, over the seeds that both have."""
    return spread(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))


def unpaired(ours: Iterable[float], theirs: Iterable[float]) -> Spread | None:
    """Ours less theirs, of samples that share no luck, with Welch's interval; None of no values, no interval below two.

    ``sd`` is None: it is of no one sample.
    """
    from scipy.special import stdtrit

    one, other = list(ours), list(theirs)
    if not one or not other:
        return None
    mean, n = statistics.fmean(one) - statistics.fmean(other), len(one) + len(other)
    if min(len(one), len(other)) < 2:
        return Spread(mean, n, None, None, None)
    parts = [statistics.variance(values) / len(values) for values in (one, other)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Spread(mean, n, None, mean, mean)
    shares = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (one, other), strict=True))
    half = float(stdtrit(error**4 / shares, (1 + CONFIDENCE) / 2)) * error
    return Spread(mean, n, None, mean - half, mean + half)


# ---------------------------------------------------------------- text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; a bar within a cell would end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def plus_minus(found: Spread | None) -> str:
    """97.41 ± 0.12; of one value without a spread."""
    return "" if found is None else f"{found.mean:.2f}" + ("" if found.sd is None else f" ± {found.sd:.2f}")


def interval(found: Spread | None) -> str:
    """+0.12 [-0.10, +0.34]; of one value without an interval."""
    if found is None:
        return ""
    return f"{found.mean:+.2f}" + ("" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]")


def pretty(value: Any, indent: str = "") -> str:
    """JSON in which a list or an object without others in it is one line."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, dict | list) for item in inner):
        return json.dumps(value, allow_nan=False)
    deeper = indent + " "
    if isinstance(value, dict):
        lines = [f"{deeper}{json.dumps(key)}: {pretty(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(f"{deeper}{pretty(item, deeper)}" for item in value) + f"\n{indent}]"


# ---------------------------------------------------------------- runs


def read(folder: Path) -> dict[str, Any]:
    """result.json of a run."""
    content: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
    return content


@contextmanager
def ending(deadline: float | None) -> Iterator[None]:
    """Ctrl-C at the deadline, also where a shell has Ctrl-C ignored (nohup): the run ends with a checkpoint."""
    if deadline is None:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(max(deadline - time.monotonic(), 0), os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def unlike_store(folder: Path, store: Store) -> Iterator[str]:
    """Says of every stage of a run whose stored result is gone, or is not what result.json says."""
    for stage in read(folder)["stages"]:
        stored = store.result(stage["key"])
        where = f"{folder.name}, stage {stage['name']!r}, {stage['key'][:12]}"
        if stored is None:
            yield f"{where}: not in the store"
        elif any(stored[name] != stage[name] for name in MEASURED):
            yield f"{where}: the store says something else"


def written(path: Path) -> bytes:
    """The content of one of the table's files."""
    if not path.is_file():
        raise StorageError("there is no table to check", where=str(path), fix="Train it: leave out --check.")
    return path.read_bytes()


def unlike(here: Any, there: Any, where: str) -> Iterator[str]:
    """Every place at which two JSON values differ."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            yield from unlike(here.get(key), there.get(key), f"{where}.{key}")
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        for number, (one, other) in enumerate(zip(here, there, strict=True)):
            yield from unlike(one, other, f"{where}.{number}")
    elif here != there:
        yield f"{where}: {here!r} in the table, {there!r} in the runs"


def protocol(result: Table) -> dict[str, Any]:
    """What every table's figures depend on: data, split, training, selection, seeds, objective, numerics."""
    recipe, found = result["recipe"], result["protocol"]
    return {
        "data": {key: value for key, value in recipe["data"].items() if key not in PLACES},
        "images": {name: found[f"{name}_images"] for name in ("train", "monitor", "test")},
        "selection": found["selection"],
        "seeds": found["seeds"],
        "train": recipe["train"],
        "objective": recipe["objective"],
        "threads": recipe["threads"],
        "precision": recipe["precision"],
    }


def command(script: str, arguments: Sequence[str], places: Mapping[str, str]) -> str:
    """The command line without this machine's folders: of the options in ``places`` a word stands for the value."""
    shown = [places.get(before, text) for before, text in zip(["", *arguments], arguments, strict=False)]
    return shlex.join(["python", f"benchmarks/{script}", *shown])


def read_book(path: Path) -> dict[str, Any]:
    """Which runs a table is made of, and the commands that made them."""
    book: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"commands": [], "runs": {}}
    return book


def differences(files: tuple[Path, Path], again: Table, text: str, folders: Iterable[Path], store: Store) -> list[str]:
    """Every difference between a table, its runs and their store.

    Args:
        files: the table's JSON and page.
        again: what the runs give.
        text: the page that the JSON gives.
        folders: of the runs.
        store: theirs.
    """
    content, page = files
    found = [*unlike(json.loads(written(content)), json.loads(pretty(again)), "table")]
    if written(page).decode() != text:
        found.append(f"{page.name} is not what {content.name} gives")
    return found + [text for folder in folders for text in unlike_store(folder, store)]


def told(found: list[str]) -> int:
    """Prints the differences, or that there are none; the exit status."""
    print("\n".join(found) or "The table is what its runs and their store say.")
    return 1 if found else 0
