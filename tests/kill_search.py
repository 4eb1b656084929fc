"""Kills searches with SIGKILL, several times each, and checks that running them again starts no finished stage, repeats
at most one checkpoint interval a kill, and ends with the uninterrupted search's chain, weights and decisions.

    python tests/kill_search.py SEARCHES KILLS [SEED]

Half of the kills come behind a random step, half at a write, fsync or rename.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from kill import at_boundary, in_child, outcome_hash

import kdcore.training.loop
from kdcore.journal import Journal

RECIPE = """
threads = 1
data = { name = "digits", batch_size = 64 }
teacher = { model = "mlp", size = 4, width = 16 }
student = { model = "mlp", size = 1 }
train = { epochs = 2, lr = 0.1 }
controller = [{ name = "dskd", patience = 1 }]
execute = { checkpoint_seconds = 0, log_every = 7 }
[strategy]
name = "search"
mode = "MODE"
candidates = [{ model = "mlp", size = 2, width = 16 }, { model = "mlp", size = 3, width = 16 }]
"""


def counting_steps(steps: Path, fatal: int = 0) -> Callable[[], None]:
    """Appends a byte to ``steps`` for every step that is trained, and dies behind the one numbered ``fatal``."""

    def prepare() -> None:
        step, count = kdcore.training.loop._step, [0]
        handle = os.open(steps, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def counted(session: object) -> None:
            step(session)
            os.write(handle, b".")
            count[0] += 1
            if count[0] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        kdcore.training.loop._step = counted

    return prepare


def run(arguments: list[str], *prepare: Callable[[], None]) -> int:
    """The wait status of a run in a child."""
    return os.waitpid(in_child(arguments, lambda: [one() for one in prepare] and None), 0)[1]


def finished(root: Path) -> set[str]:
    """Keys of the stages whose results are stored."""
    return {path.parent.name for path in root.glob("store/results/*/result.json") if len(path.parent.name) == 64}


def started(root: Path) -> list[str]:
    """Keys of the stages that the journal says began, in order."""
    return [r["key"] for path in root.glob("*-*/journal.jsonl") for r in Journal(path).of("start")]


def told(root: Path) -> list[object]:
    """What the search found."""
    result = json.loads(next(root.glob("*/result.json")).read_bytes())
    kept = [result[name] for name in ("note", "choices", "evidence")]
    return [*kept, list(result["replicates"]), outcome_hash(root)]


def search(root: Path, recipe: Path, kills: int, chance: random.Random, unique: int, boundaries: int) -> str:
    """Kills a search so many times and finishes it; returns what was wrong.

    Args:
        root: of the search.
        recipe: its recipe.
        kills: from 1.
        chance: where it is killed.
        unique: steps that an uninterrupted search takes.
        boundaries: its writes, fsyncs and renames.
    """
    arguments, steps = ["run", str(recipe), "--root", str(root)], root.with_suffix(".steps")
    for number in range(kills):
        stored, before = finished(root), len(started(root))
        if number % 2:
            fatal = at_boundary(chance.randint(1, boundaries // 2), root.with_suffix(".counter"))
            run(arguments, counting_steps(steps), fatal)
        else:
            run(arguments, counting_steps(steps, chance.randint(1, max(1, unique // kills))))
        if again := stored & set(started(root)[before:]):
            return f"after kill {number} these began again: {sorted(again)}"
    stored, before = finished(root), len(started(root))
    status = run(arguments, counting_steps(steps))
    if status or stored & set(started(root)[before:]):
        return f"the last run ended with status {status}, or began a finished stage again"
    interval = max(json.loads(path.read_bytes())["steps"] for path in root.glob("store/results/*/result.json")) // 2
    spare = steps.stat().st_size - unique
    return "" if 0 <= spare <= kills * interval else f"{spare} steps were repeated, an epoch has {interval}"


def torture(searches: int, kills: int, seed: int) -> int:
    """Kills ``searches`` searches; returns how many went on as they should."""
    chance, good = random.Random(seed), 0
    for number in range(searches):
        with tempfile.TemporaryDirectory() as folder:
            recipe, whole, root = (Path(folder, name) for name in ("search.toml", "whole", "killed"))
            recipe.write_text(RECIPE.replace("MODE", ("exhaustive", "greedy", "beam")[number % 3]))
            counter, steps = Path(folder, "counter"), Path(folder, "whole.steps")
            arguments = ["run", str(recipe), "--root", str(whole)]
            if run(arguments, counting_steps(steps), at_boundary(0, counter)):
                raise SystemExit("the uninterrupted search failed")
            unique, boundaries = steps.stat().st_size, int(counter.read_text())
            problem = search(root, recipe, kills, chance, unique, boundaries)
            if not problem and told(root) != told(whole):
                problem = "another outcome"
            print(f"search {number}: {unique} steps, {boundaries} boundaries: {problem or 'right'}", flush=True)
            good += not problem
    print(f"{good}/{searches}")
    return good


if __name__ == "__main__":
    wanted, kills = int(sys.argv[1]), int(sys.argv[2])
    entropy = int(sys.argv[3]) if len(sys.argv) > 3 else int.from_bytes(os.urandom(4), "big")
    print(f"seed {entropy}", flush=True)
    sys.exit(torture(wanted, kills, entropy) != wanted)
