"""``kdcore search``: the tree of chains while it grows; without a terminal a line a chain and the tree at the end."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..chains import label
from ..errors import Interrupted, RecipeError
from ..job import Event
from ..recipe import load
from ..report.formats import counted
from .console import RunConsole, plain
from .tree import Growth, Learner, Node, Tree, spread

CHOICES = 3  # the last ones are shown below a tree that grows
FEW = 3  # seeds whose stops are shown one by one
KINDS = {"asked", "stage_started", "tick", "log", "decision", "stage_finished", "choice"}


def is_search(strategy: str) -> bool:
    """True for the strategy that grows a tree of chains."""
    return strategy.rpartition("/")[2] == "search"


def check_searches(recipe: Path, sets: Sequence[str]) -> None:
    """Refuses a recipe that names another strategy."""
    name = load(recipe, sets).strategy.name
    if not is_search(name):
        fix = 'Write [strategy] and below it name = "search" and candidates = [...], or use kdcore run.'
        raise RecipeError(f"{name!r} grows no tree of chains", where="strategy.name", fix=fix)


class TreeConsole(RunConsole):
    """Shows a run as the tree of its chains. Use it as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.growth = Growth()
        self.last_words: list[Event] = []
        self.display = Live(console=self.console, transient=True, refresh_per_second=4)

    def __enter__(self) -> TreeConsole:
        if self.live:
            self.display.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.display.stop()
        with suppress(SystemExit):
            self._show_whole(self.growth.tree())
        for event in self.last_words:
            super().handle(event)
        if not self.last_words and any(isinstance(one, Interrupted) for one in error):
            with suppress(SystemExit):
                self._print("No student so far: the first chain is not finished.")

    def _show_whole(self, tree: Tree) -> None:
        """What stays on the screen; without a terminal, choices were printed as they were made."""
        if tree.roots:
            self.console.print(TreeView(tree, whole=True))
        for text in tree.choices if self.live else ():
            self._print(text)

    def handle(self, event: Event) -> None:
        """Shows one event."""
        if event["kind"] == "best_so_far":
            self.last_words.append(event)  # below the tree
            return
        if event["kind"] not in KINDS:
            super().handle(event)
            return
        self.growth.add(event)
        if self.live:
            self.display.update(TreeView(self.growth.tree()))
        elif event["kind"] in ("choice", "log"):
            super().handle(event)
        elif event["kind"] == "stage_finished":
            self._say_finished(event["key"])

    def _say_finished(self, key: str) -> None:
        """One line for a chain that ends here, and that no seed is missing of."""
        controllers = self.growth.tree().controllers
        for node in self.growth.of(key):
            if len(node.chain) > 1 and node.is_done and not node.children:
                with suppress(SystemExit):
                    self._print(chain_line(node, controllers))


def chain_line(node: Node, controllers: Sequence[str]) -> str:
    """``10-8-2: 97.31 ± 0.12 % on the monitor split, stopped at 7, 9, 0.42 points above its control``."""
    gain = _gain(node.learners)
    facts = {
        "{} % on the monitor split": _accuracy(node.learners),
        "stopped at {}": _stopped(node.learners),
        f"{{}} points {'below' if gain.startswith('-') else 'above'} its control": gain.lstrip("+-"),
        f"{{}} % without {', '.join(controllers)}": _accuracy(node.without),
        "{}": "reused" if _state(node) == "reused" else "",
    }
    said = [words.format(fact) for words, fact in facts.items() if fact]
    return f"{label(node.chain)}: {', '.join(said)}"


@dataclass(frozen=True)
class TreeView:
    """A tree for rich, with the last choices below it.

    Args:
        tree: what is shown.
        whole: show all of it, and no choices; else finished models that are not on the best chain are left out if the
            terminal is not high enough.
    """

    tree: Tree
    whole: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        choices = () if self.whole else self.tree.choices[-CHOICES:]
        tree, hidden = self.tree, 0
        below = 4 + sum(1 + len(text) // options.max_width for text in choices)  # with two lines of heads
        if not self.whole and _size(tree.roots) > console.height - below:
            tree = Tree(_pruned(tree.roots), tree.controllers, tree.choices)
            hidden = _size(self.tree.roots) - _size(tree.roots)
        yield _table(tree, options.max_width, options.ascii_only)
        left_out = [f"(not shown: {counted(hidden, 'finished model')})"] if hidden else []
        for text in [*left_out, *choices]:
            yield Text(plain(text, options.ascii_only))


def _table(tree: Tree, width: int, ascii_only: bool) -> RenderableType:
    """One row a model; left out are columns that no model has anything for, and the last ones of a narrow terminal."""
    rows = list(_rows(tree.roots))
    names = [plain(guides, ascii_only) + node.chain[-1] + (" on labels" if node.role else "") for guides, node in rows]
    ended = "done" if all(node.is_done for _, node in rows) else ""  # of a whole tree it says nothing
    several = any(len(node.learners) > 1 for _, node in rows)
    columns: dict[str, Callable[[Node], str]] = {
        "state": lambda node: _state(node) if _state(node) != ended else "",
        "monitor %" + "\nmean ± sd" * several: lambda node: _accuracy(node.learners),
        "stopped\nat": lambda node: _stopped(node.learners),
        "over\ncontrol": lambda node: _gain(node.learners),
        f"without\n{', '.join(tree.controllers)}": lambda node: _accuracy(node.without),
    }
    cells = {
        plain(head, ascii_only): [plain(cell(node), ascii_only) for _, node in rows] for head, cell in columns.items()
    }
    cells = {head: column for head, column in cells.items() if any(column)}
    while len(cells) > 1 and _widest(names) + sum(2 + _widest([h, *c]) for h, c in cells.items()) > width:
        cells.popitem()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for head in cells:
        table.add_column(head, justify="left" if head == "state" else "right", no_wrap=head != "state")
    for i, (_, node) in enumerate(rows):
        row = (Text(names[i]), *(Text(column[i]) for column in cells.values()))
        table.add_row(*row, style="bold" if node.is_best else "")
    return table


def _widest(texts: Sequence[str]) -> int:
    """Of their lines; a state may be folded at its comma."""
    return max(len(line) for text in texts for line in re.split(r"\n|, (?=[a-z])", text))


def _rows(nodes: Sequence[Node], before: str = "", depth: int = 0) -> Iterator[tuple[str, Node]]:
    """Every node, each below what taught it, with the lines before its name."""
    for node in nodes:
        last = node is nodes[-1]
        yield before + (("└── " if last else "├── ") if depth else ""), node
        yield from _rows(node.children, before + (("    " if last else "│   ") if depth else ""), depth + 1)


def _size(nodes: Sequence[Node]) -> int:
    return sum(1 + _size(node.children) for node in nodes)


def _pruned(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Without finished branches, but for the best."""
    kept = [replace(node, children=_pruned(node.children)) for node in nodes]
    return tuple(node for node in kept if node.is_best or node.children or not node.is_done)


def _tick(learner: Learner) -> str:
    return f"{learner.tick:.1f}".removesuffix(".0")


def _state(node: Node) -> str:
    """``waiting``, ``epoch 3/30``, ``1/2 seeds done, epoch 3/30``, ``done``, ``reused``."""
    if node.is_done:
        return "reused" if all(learner.state == "reused" for learner in (*node.learners, *node.without)) else "done"
    learners = node.without if all(learner.is_done for learner in node.learners) else node.learners
    done = sum(learner.is_done for learner in learners)
    running = [learner for learner in learners if learner.state == "running"]
    seeds = f"{done}/{len(learners)} seeds done" if len(learners) > 1 and (done or running) else ""
    ticks = f"{running[0].unit} {', '.join(_tick(r) for r in running)}/{running[0].ticks}" if running else ""
    return ", ".join(filter(None, [seeds, ticks])) or "waiting"


def _accuracy(learners: Sequence[Learner]) -> str:
    """Of the finished ones, or what the others have so far."""
    done = [learner for learner in learners if learner.is_done] or learners
    return spread([learner.accuracy for learner in done if learner.accuracy is not None])


def _gain(learners: Sequence[Learner]) -> str:
    """Over the label-only control, in points."""
    done = [learner for learner in learners if learner.is_done]
    gains = [r.accuracy - r.control for r in done if r.accuracy is not None and r.control is not None]
    return f"{100 * statistics.fmean(gains):+.2f}" if gains else ""


def _stopped(learners: Sequence[Learner]) -> str:
    """``7, 9, -``: one a seed that ended or was stopped, ``-`` where it was not; of many seeds ``8.2 in 4 of 5``."""
    stops = [learner.stopped for learner in learners if learner.is_done or learner.stopped is not None]
    found = [stop for stop in stops if stop is not None]
    if not found:
        return ""
    if len(stops) > FEW:
        return f"{statistics.fmean(found):.1f} in {len(found)} of {len(stops)}"
    return ", ".join("-" if stop is None else f"{stop:g}" for stop in stops)
