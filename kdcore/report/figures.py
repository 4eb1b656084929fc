"""Figures as inline SVG: small, with text as text, and the same bytes for the same numbers."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from .averages import Variant
from .curves import Series, Stop

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, ALARM = "#1f2328", "#5f6368", "#a4161a"
PANEL = (276.0, 184.0)  # points; a third of a wide page and the whole of a telephone show it at about its own size
NODE, GAP_ACROSS, GAP_DOWN = (116.0, 62.0), 74.0, 40.0

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kdcore",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.labelcolor": INK,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Node:
    """A model of the chain. ``stopped`` says where its distillation was: "epoch 12"."""

    role: str
    model: str
    accuracy: str
    stopped: str = ""


def lines(name: str, label: str, series: Sequence[Series], stops: Sequence[Stop], unit: str, percent: bool) -> str:
    """Curves over epochs or steps."""

    def draw(axes: Axes) -> None:
        for s in series:
            axes.plot(*zip(*s.points, strict=True), color=s.color, linestyle=s.dash)

    return panel(name, label, draw, stops, unit, percent)


def averages(
    name: str, label: str, found: Sequence[Variant], limits: tuple[float, float], last: float, unit: str
) -> str:
    """Mean curves with light bands from the lowest to the highest, on axes that several figures share.

    Args:
        name: begins the figure's ids.
        label: what it shows, for those who do not see it.
        found: the curves.
        limits: of the shares that are shown.
        last: the place where the axis ends.
        unit: of places.
    """

    def draw(axes: Axes) -> None:
        for one in found:
            if one.stages > 1:
                places, low, high = zip(*one.band, strict=True)
                axes.fill_between(places, low, high, color=one.series.color, alpha=0.16, linewidth=0)
            axes.plot(*zip(*one.series.points, strict=True), color=one.series.color, linestyle=one.series.dash)
            for at in one.stops[1:] and one.stops:
                axes.axvline(at, color=ALARM, linewidth=0.9, linestyle=":")
        axes.set(xlim=(0, last), ylim=limits)

    stops = [Stop(mean(one.stops), "") for one in found if one.stops]
    return panel(name, label, draw, stops, unit, percent=True)


def bands(
    name: str, label: str, series: Sequence[Series], places: Sequence[float], stops: Sequence[Stop], unit: str
) -> str:
    """Shares over epochs or steps, stacked; blank at the places where none was measured."""
    levels = [dict(s.points) for s in series]
    empty = {x: math.nan for x in places if not any(x in level for level in levels)}
    heights = [[level.get(x, empty.get(x, 0.0)) for x in places] for level in levels]

    def draw(axes: Axes) -> None:
        axes.stackplot(places, heights, colors=[s.color for s in series], edgecolor="white")
        axes.update_datalim([(x, 0.0) for x in places])  # the axis spans the blank too
        axes.set_ylim(0, 1)
        axes.margins(x=0)

    return panel(name, label, draw, stops, unit, percent=True)


def chain(name: str, label: str, nodes: Sequence[Node], down: bool) -> str:
    """Models from teacher to student, across a wide page or down a narrow one."""
    step = NODE[1] + GAP_DOWN if down else NODE[0] + GAP_ACROSS
    run = step * (len(nodes) - 1)
    width, height = (NODE[0] + 124, NODE[1] + run) if down else (NODE[0] + run, NODE[1])
    with styled():
        figure = blank(width + 4, height + 4)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-2, width + 2), ylim=(-2, height + 2))
        axes.set_axis_off()
        for i, node in enumerate(nodes):
            x, y = (0.0, run - i * step) if down else (i * step, 0.0)
            _draw_node(axes, node, x, y)
            if i:
                _draw_arrow(axes, node.stopped, x, y, down)
        return to_svg(figure, name, label)


def _draw_node(axes: Axes, node: Node, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    edge, width = (INK, 1.4) if node.role == "student" else (QUIET, 0.9)
    style = "round,pad=0,rounding_size=6"
    axes.add_patch(FancyBboxPatch((x, y), *NODE, boxstyle=style, facecolor="#f3f6fa", edgecolor=edge, linewidth=width))
    middle, name = x + NODE[0] / 2, node.model if len(node.model) <= 16 else f"{node.model[:15]}…"
    axes.text(middle, y + 47, node.role, ha="center", va="center", fontsize=9, color=QUIET)
    axes.text(middle, y + 31, name, ha="center", va="center", fontsize=11, weight="bold")
    axes.text(middle, y + 13, node.accuracy, ha="center", va="center", fontsize=11)


def _draw_arrow(axes: Axes, stopped: str, x: float, y: float, down: bool) -> None:
    from matplotlib.patches import FancyArrowPatch

    middle, top = x + NODE[0] / 2, y + NODE[1]
    start = (middle, top + GAP_DOWN - 3) if down else (x - GAP_ACROSS + 3, y + NODE[1] / 2)
    end = (middle, top + 3) if down else (x - 3, y + NODE[1] / 2)
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=QUIET, shrinkA=0, shrinkB=0))
    if stopped and down:
        axes.text(middle + 8, top + GAP_DOWN / 2, f"stopped at {stopped}", va="center", fontsize=9.5, color=ALARM)
    elif stopped:
        middle = x - GAP_ACROSS / 2
        axes.text(middle, end[1] + 6, "stopped at", ha="center", va="bottom", fontsize=9.5, color=ALARM)
        axes.text(middle, end[1] - 6, stopped, ha="center", va="top", fontsize=9.5, color=ALARM)


def panel(name: str, label: str, draw: Callable[[Axes], None], stops: Sequence[Stop], unit: str, percent: bool) -> str:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    width, height = PANEL
    with styled():
        figure = blank(width, height)
        axes = figure.add_axes((44 / width, 36 / height, 1 - 54 / width, 1 - 54 / height))
        draw(axes)
        for stop in stops:
            axes.axvline(stop.at, color=ALARM, linewidth=1.2, linestyle="--")
            axes.text(stop.at, 1.02, "stop", transform=axes.get_xaxis_transform(), ha="center", color=ALARM, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(unit)
        return to_svg(figure, name, label)


@contextmanager
def styled() -> Iterator[None]:
    """Our settings over matplotlib's own defaults, whatever the user's are; both are back afterwards."""
    from matplotlib import style

    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # the browser has other fonts
        yield


def blank(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_visible(False)
    return figure


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure's <svg> alone: no prolog, sizes, fonts or page-wide style, and no id that another figure has."""
    from markupsafe import escape

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    _, _, svg = out.getvalue().partition("<svg ")
    head, _, body = svg.partition(">")
    box = re.findall(r'viewBox="[^"]*"', head)[0]
    body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", lambda tag: _own_tag(tag[0], name), body)
    return f'<svg {box} role="img" aria-label="{escape(label)}">{body.strip()}'


def _own_tag(tag: str, name: str) -> str:
    if tag.startswith("<g id="):  # nothing refers to a group
        return "<g>"
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", re.sub(r"font-family: [^;]*; ", "", tag))
