"""Table 1 of Si et al. 2025: chains of assistants with and without dynamic stop, beside the published numbers.

    python benchmarks/table_dskd.py mnist --root FOLDER --plan                # stages and time of every part
    python benchmarks/table_dskd.py mnist --root FOLDER --parts main alpha    # train; again: go on
    python benchmarks/table_dskd.py mnist --check                             # does the table say what the runs say?

FOLDER holds the data in torchvision's layout. Runs and their store lie in --runs; the table in results/ is written anew
after every run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dskd_facts import facts
from dskd_runs import PARTS, STRONG, Bench, Unit, execute, forecast, units
from dskd_table import page
from tables import command, differences, pretty, read_book, told, written

from kdcore.errors import KdError
from kdcore.files import replace_file
from kdcore.store import Store

HERE = Path(__file__).resolve().parent
PLACES = {"--root": "FOLDER", "--runs": "RUNS", "--out": "OUT", "--recipe": "RECIPE"}
EXAMPLES = HERE.parent / "examples"


def main(arguments: Sequence[str]) -> int:
    """What the command line says; the exit status."""
    options = _parser().parse_args(arguments)
    bench = Bench(
        options.data, options.recipe or EXAMPLES / f"dskd_{options.data}.toml", options.runs.resolve(), options.root,
        options.seeds, options.epochs, options.jobs, tuple(options.strong) or STRONG.get(options.data, ()),
    )  # fmt: skip
    wanted = [unit for part in options.parts for unit in units(bench, part)]
    if options.check:
        return check(bench, options.out)
    if options.plan:
        print(plan(bench, wanted))
        return 0
    deadline = None if options.budget_minutes is None else time.monotonic() + 60 * options.budget_minutes
    return train(bench, wanted, options.out, command("table_dskd.py", arguments, PLACES), deadline)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="mnist, cifar10, svhn")
    parser.add_argument("--root", type=Path, help="folder of the data's files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="of every chain, default 3")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--jobs", type=int, default=2, help="stages at once, default 2")
    parser.add_argument("--runs", type=Path, default=Path("runs/dskd"), help="runs and their store, default runs/dskd")
    parser.add_argument("--budget-minutes", type=float, help="end after so many minutes; the same call goes on")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="of the table, default benchmarks/results")
    parser.add_argument("--plan", action="store_true", help="print what would be trained, and how long it takes")
    parser.add_argument(
        "--check", action="store_true", help="compare the committed table with --runs; exit 1 if unlike"
    )
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--strong", nargs="+", default=[], metavar="KEY=VALUE", help="what brings the stronger teacher")
    return parser


# ---------------------------------------------------------------- training


def train(bench: Bench, wanted: Sequence[Unit], out: Path, command: str, deadline: float | None) -> int:
    """Runs the units one after the other, and writes the table after each; 3 if the time was up before the end."""
    print(plan(bench, wanted))
    book = read_book(_book_path(bench))
    book["commands"] = list(dict.fromkeys([*book["commands"], command]))
    for unit in wanted:
        folder = None
        if deadline is None or time.monotonic() < deadline:
            folder = execute(unit, bench, deadline)
        if folder is None:
            print(f"The time is up before {unit.name!r} is finished; the same command goes on.")
            return 3
        book["runs"][unit.name] = {"part": unit.part, "run": folder.name}
        replace_file(_book_path(bench), json.dumps(book, indent=1).encode())
        write(bench, book, out)
    return 0


def plan(bench: Bench, wanted: Sequence[Unit]) -> str:
    """What is to be trained, as a table."""
    lines = [f"{'run':<16}{'stages':>8}{'to train':>10}{'minutes':>9}"]
    found = forecast(bench, wanted)
    for line in found:
        time_left = "?" if line.seconds is None else f"{line.seconds / 60:.0f}"
        lines.append(f"{line.unit.name:<16}{line.stages:>8}{line.missing:>10}{time_left:>9}")
    total = [line.seconds for line in found if line.seconds is not None]
    known = f"{sum(total) / 60:.0f}" if len(total) == len(found) else "?"
    lines.append(f"{'together':<16}{'':>8}{sum(line.missing for line in found):>10}{known:>9}")
    return "\n".join([*lines, f"minutes at {bench.jobs} stages at once, if nothing stops early and no time is lost"])


# ---------------------------------------------------------------- the table


def _book_path(bench: Bench) -> Path:
    return bench.runs / f"table-{bench.data}.json"


def write(bench: Bench, book: Mapping[str, Any], out: Path) -> None:
    """The table's JSON and page."""
    content = contents(bench, book)
    for path, text in ((_json(bench, out), pretty(content) + "\n"), (_page(bench, out), page(content))):
        replace_file(path, text.encode())
        print(path)


def contents(bench: Bench, book: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of the runs that the book names, by part."""
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for name, entry in book["runs"].items():
        parts[entry["part"]].append({"name": name, **facts(bench.runs / entry["run"])})
    return {
        "data": bench.data,
        "commands": book["commands"],
        "missing": [part for part, runs in parts.items() if len(runs) < len(PARTS[part](bench))],
        "parts": {part: runs for part, runs in parts.items() if runs},
    }


def _json(bench: Bench, out: Path) -> Path:
    return out / f"dskd-{bench.data}.json"


def _page(bench: Bench, out: Path) -> Path:
    return out / f"dskd-{bench.data}.md"


# ---------------------------------------------------------------- check


def check(bench: Bench, out: Path) -> int:
    """Prints every difference between the table, its runs and their store; 1 if there is one."""
    content = json.loads(written(_json(bench, out)))
    runs = {run["name"]: {"part": part, "run": run["run"]} for part, found in content["parts"].items() for run in found}
    again = contents(bench, {"commands": content["commands"], "runs": runs})
    folders = [bench.runs / entry["run"] for entry in runs.values()]
    files = _json(bench, out), _page(bench, out)
    found = differences(files, again, page(content), folders, Store(bench.runs / "store"))
    return told(found)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (KdError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
