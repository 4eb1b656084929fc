"""``kdcore report``: the page of a run, finished or not."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from ..errors import RecipeError, StorageError
from ..files import storing
from ..progress import is_finished, look, state_of
from ..reading import read_table
from ..report import write, write_live

LEAST_REST = 10  # times as long as the page took: watching takes a tenth of a core at most, however large the run


def write_report(folder: Path, watch: bool, seconds: float) -> None:
    """Writes report.html of a run; with ``watch`` again and again until it is finished."""
    if not any((folder / name).is_file() for name in ("result.json", "journal.jsonl")):
        raise RecipeError("no run of kdcore", where=str(folder), fix="Give its folder, e.g. runs/digits-1a2b3c4d.")
    if watch:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is its usual end
        print(f"{folder / 'report.html'} follows the run until it is finished", flush=True)
        _follow(folder, seconds)
    else:
        _write(folder, seconds, {}, {})
        print(folder / "report.html")


def _follow(folder: Path, seconds: float) -> None:
    results: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    seen = None
    while True:
        now, started = state_of(folder), time.monotonic()
        if now != seen and _write(folder, seconds, results, drawn):
            return
        seen = now
        time.sleep(max(seconds, LEAST_REST * (time.monotonic() - started)))


def _write(folder: Path, seconds: float, results: dict[str, Any], drawn: dict[str, Any]) -> bool:
    """Writes the page as it is now; True if that is the last one."""
    path = folder / "report.html"
    if not is_finished(folder):
        write_live(look(folder, results), path, max(1, round(seconds)), drawn)
    finished = is_finished(folder)  # the run may have ended, and written its page, just before ours
    if finished:
        _write_last(folder / "result.json", path)
    return finished


def _write_last(result: Path, path: Path) -> None:
    try:
        with storing(result):
            found = read_table(result)
        write(found, path)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        fix = "kdcore resume the run: it writes it again."
        raise StorageError(f"no result of kdcore: {error!r}", where=str(result), fix=fix) from error
