"""The chains of a run as one tree: every model once, below the one that it learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from .figures import ALARM, INK, QUIET, blank, styled, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Corner: TypeAlias = tuple[float, float]
Draw: TypeAlias = "Callable[[Axes, Node, float, float, Corner | None], None]"

BOX, GAP = (100.0, 38.0), (92.0, 12.0)  # points
LINE, INDENT, MOST_INDENT = (172.0, 24.0), 18.0, 108.0
BEND, NAME_LENGTH = 18.0, 14
FILL, CHOSEN_FILL = "#f3f6fa", "#e1ecf8"


@dataclass(frozen=True)
class Node:
    """A model of a tree.

    Args:
        model: its name.
        accuracy: as text.
        parent: the index of its teacher among the nodes, which stands before it; None for a first teacher.
        stopped: what its arrow says: "stop 12", "no stop".
        chosen: it is part of the delivered student's chain.
    """

    model: str
    accuracy: str
    parent: int | None
    stopped: str
    chosen: bool


def columns(nodes: Sequence[Node]) -> int:
    """Of the tree across a page: the models of its longest chain."""
    return 1 + max(_depths(nodes), default=0)


def leaves(nodes: Sequence[Node]) -> int:
    """Rows of the tree across a page."""
    return len(nodes) - len({node.parent for node in nodes} - {None})


def across(name: str, label: str, nodes: Sequence[Node]) -> str:
    """Teachers on the left, a column for each step of distillation."""
    width, height = BOX
    step = width + GAP[0]
    corners = [(x * step, -y * (height + GAP[1])) for x, y in zip(_depths(nodes), _rows(nodes), strict=True)]

    def draw(axes: Axes, node: Node, x: float, y: float, above: Corner | None) -> None:
        middle = y + height / 2
        _box(axes, node, x, y, BOX)
        _text(axes, node, x + width / 2, y + 26, _short(node.model), weight="bold")
        _text(axes, node, x + width / 2, y + 11, node.accuracy)
        if above is not None:
            start, bend = above[0] + width, above[0] + width + BEND
            _arrow(axes, node, [(start, above[1] + height / 2), (bend, above[1] + height / 2), (bend, middle)], x)
            _stopped(axes, node, bend + 5, middle + 6)

    return _drawn(name, label, nodes, corners, (columns(nodes) * step - GAP[0], height), draw)


def down(name: str, label: str, nodes: Sequence[Node]) -> str:
    """A model a row, each to the right of its teacher, as folders are listed: for telephones and deep trees."""
    depths = _depths(nodes)
    indent = min(INDENT, MOST_INDENT / max([*depths, 1]))
    order = {i: row for row, i in enumerate(_order(nodes))}
    width, height = LINE
    corners = [(depth * indent, -order[i] * (height + 6)) for i, depth in enumerate(depths)]

    def draw(axes: Axes, node: Node, x: float, y: float, above: Corner | None) -> None:
        middle = y + height / 2
        _box(axes, node, x, y, LINE)
        _text(axes, node, x + 8, middle, _short(node.model), ha="left", weight="bold")
        _text(axes, node, x + width - 8, middle, node.accuracy, ha="right")
        if above is not None:
            _arrow(axes, node, [(above[0] + BEND / 3, above[1]), (above[0] + BEND / 3, middle)], x)
            _stopped(axes, node, x + width + 6, middle)

    return _drawn(name, label, nodes, corners, (max(depths) * indent + width + 76, height), draw)


# ---------------------------------------------------------------- places


def _depths(nodes: Sequence[Node]) -> list[int]:
    depths: list[int] = []
    for node in nodes:
        depths.append(0 if node.parent is None else depths[node.parent] + 1)
    return depths


def _order(nodes: Sequence[Node], parent: int | None = None) -> Iterator[int]:
    """Every node before its learners, these together."""
    for i, node in enumerate(nodes):
        if node.parent == parent:
            yield i
            yield from _order(nodes, i)


def _rows(nodes: Sequence[Node]) -> list[float]:
    """A row for each leaf; a teacher stands in the middle of its learners."""
    rows: dict[int, float] = {}
    leaf = 0.0
    for i in reversed(list(_order(nodes))):
        own = [rows[j] for j, node in enumerate(nodes) if node.parent == i]
        rows[i] = (min(own) + max(own)) / 2 if own else leaf
        leaf += not own
    return [leaf - 1 - rows[i] for i in range(len(nodes))]


# ---------------------------------------------------------------- drawing


def _drawn(name: str, label: str, nodes: Sequence[Node], corners: Sequence[Corner], size: Corner, draw: Draw) -> str:
    """``size`` is the width of all, and the height of a node at the lowest corner."""
    low, high = min(y for _, y in corners), max(y for _, y in corners) + size[1]
    with styled():
        figure = blank(size[0] + 4, high - low + 4)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-2, size[0] + 2), ylim=(low - 2, high + 2))
        axes.set_axis_off()
        for node, (x, y) in sorted(zip(nodes, corners, strict=True), key=lambda found: found[0].chosen):  # on top
            draw(axes, node, x, y, None if node.parent is None else corners[node.parent])
        return to_svg(figure, name, label)


def _box(axes: Axes, node: Node, x: float, y: float, size: Corner) -> None:
    from matplotlib.patches import FancyBboxPatch

    face, edge, width = (CHOSEN_FILL, INK, 2.0) if node.chosen else (FILL, QUIET, 0.8)
    shape = "round,pad=0,rounding_size=5"
    axes.add_patch(FancyBboxPatch((x, y), *size, boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=width))


def _text(axes: Axes, node: Node, x: float, y: float, text: str, ha: str = "center", weight: str = "normal") -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=10, weight="bold" if node.chosen else weight)


def _arrow(axes: Axes, node: Node, bends: Sequence[Corner], end: float) -> None:
    """Over the bends, then straight to the right up to ``end``."""
    color, width = (INK, 2.0) if node.chosen else (QUIET, 0.9)
    xs, ys = zip(*bends, (end - 3, bends[-1][1]), strict=True)
    axes.plot(xs, ys, color=color, linewidth=width, solid_joinstyle="round")
    tip = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (end - 1, ys[-1]), (end - 8, ys[-1]), arrowprops=tip)


def _stopped(axes: Axes, node: Node, x: float, y: float) -> None:
    color = ALARM if node.stopped.startswith("stop") else QUIET
    axes.text(x, y, node.stopped, va="center", fontsize=9, color=color, weight="bold" if node.chosen else "normal")


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
