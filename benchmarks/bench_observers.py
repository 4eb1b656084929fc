"""What ten observers cost as a share of a training step. The goal is below 0.5 %.

python benchmarks/bench_observers.py [PAIRS]

A stage is trained with and without ten plugins that implement every observer hook, in turns, so that both meet the same
machine; the cost is the median over the pairs of their ratio. The step is small on purpose: a larger one costs more for
the same hooks, and the share falls. Beside it stands the direct way: seconds within the hooks over seconds of a run.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kdcore import hookspecs
from kdcore.machine import make_context, make_settings
from kdcore.plugins import PluginHost, load_plugins
from kdcore.recipe import load
from kdcore.runner import Run

OBSERVERS = 10
GOAL = 0.005
RECIPE: dict[str, Any] = {
    "threads": 1,
    "data": {"name": "digits", "batch_size": 128},
    "teacher": {"model": "cnn", "size": 2},
    "student": {"model": "cnn", "size": 1},
    "train": {"epochs": 12},
}
HOOK = """
@kdcore.hookimpl
def {name}({arguments}):
    global calls
    calls += 1
"""


def observers(folder: Path) -> list[Path]:
    """Plugin files that count their calls."""
    text = "import kdcore\n\ncalls = 0\n"
    for name, hook in vars(hookspecs).items():
        if name.startswith("kdcore_") and name != "kdcore_register":
            arguments = hook.__code__.co_varnames[: hook.__code__.co_argcount]
            text += HOOK.format(name=name, arguments=", ".join(arguments))
    files = [folder / f"observer_{number}.py" for number in range(OBSERVERS)]
    for file in files:
        file.write_text(text)
    return files


class Silent:
    """A console that shows nothing."""

    def handle(self, event: Any) -> None:
        pass


def train(host: PluginHost) -> tuple[float, int]:
    """Seconds of training in a fresh store, and steps."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load(RECIPE)
        settings = make_settings(recipe, Path(folder, "store"), 1)
        run = Run(recipe, host, settings, Path(folder, "run"), Silent(), 1, make_context(host))
        result = run.execute()
    return sum(s["seconds"] for s in result["stages"]), sum(s["steps"] for s in result["stages"])


@contextmanager
def timed_hooks(host: PluginHost) -> Iterator[list[float]]:
    """Collects the seconds of every emit."""
    spent: list[float] = []
    emit = host.emit

    def timed(hook: str, **arguments: Any) -> None:
        started = time.perf_counter()
        emit(hook, **arguments)
        spent.append(time.perf_counter() - started)

    host.emit = timed  # type: ignore[method-assign]
    yield spent
    host.emit = emit  # type: ignore[method-assign]


def main(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain, watched = load_plugins(), load_plugins(files=observers(Path(folder)))
        train(plain)
        ratios, again, shares = [], [], []
        for _ in range(pairs):
            first, steps = train(plain)
            with timed_hooks(watched) as spent:
                second, _ = train(watched)
            third, _ = train(plain)
            ratios.append(2 * second / (first + third) - 1)
            again.append(third / first - 1)
            shares.append(sum(spent) / second)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread, {pairs} pairs")
    print(f"a step: {1e3 * first / steps:.2f} ms ({steps} steps)")
    for name, found in (("ten observers / none", ratios), ("none / none", again), ("within hooks", shares)):
        print(f"{name:<22}{statistics.median(found):+8.3%}  ({min(found):+.3%} to {max(found):+.3%})")
    print(f"goal {GOAL:.1%}: {'met' if statistics.median(shares) < GOAL else 'missed'} by the time within hooks")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
