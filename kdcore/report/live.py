"""The page of a run that is not finished: what is done, what goes on, and the curves so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from . import figures, tables
from .curves import OTHER_COLORS, ROLE_COLORS, Points, Series, number
from .formats import NONE, count, counted, percent, seconds
from .page import decisions, panels
from .parts import Grid, Panel, grid

if TYPE_CHECKING:
    from ..progress import Progress, StageProgress

MOST_POINTS = 400  # of a curve by steps; the panel is 276 points wide
SHORTEST_KEY = 8


def live_view(progress: Progress, refresh: int, drawn: dict[str, tuple[Panel, ...]]) -> dict[str, Any]:
    """Everything that the template shows.

    Args:
        progress: of the run.
        refresh: seconds after which a browser loads the page again.
        drawn: figures of finished stages, which are drawn once; added to.
    """
    done = sum(stage.state in ("finished", "reused") for stage in progress.stages)
    times = (progress.begun, progress.latest)
    begun, latest = (text[:19].replace("T", " ") + " UTC" if text else NONE for text in times)
    return {
        "title": f"{progress.run}: not finished",
        "refresh": refresh,
        "lede": f"This run is not finished. Stages done: {done} of the {len(progress.stages)} asked for so far.",
        "run": f"Begun {begun} · {seconds(progress.seconds)} at work · last entry {latest}",
        "warnings": list(progress.warnings),
        "stages": _stages(progress.stages),
        "figures": [(s.name, s.state, _panels(s, drawn)) for s in progress.stages if s.state != "waiting"],
        "choices": tables.choices(progress.choices),
        "decisions": decisions([stage.result for stage in progress.stages]),
    }


def _stages(stages: Sequence[StageProgress]) -> Grid:
    rows = [(s.name, s.state, _position(s), _accuracy(s.result), seconds(s.seconds)) for s in stages]
    heads = ("Stage", "State", "Progress", "Monitor accuracy", "Time")
    return grid("Stages so far", heads, "text text num long num", rows)


def _position(stage: StageProgress) -> str:
    if not stage.ticks:
        return NONE
    every = stage.result["tick"]
    size, unit = (1, "epoch") if every == "epoch" else (every, "step")
    return f"{count(size * stage.tick)} of {counted(size * stage.ticks, unit)}"


def _accuracy(result: Mapping[str, Any]) -> str:
    """Of every trained member, after its last tick."""
    last = {name: (m["curve"] or [{}])[-1].get("accuracy") for name, m in result["members"].items() if m["trained"]}
    return ", ".join(f"{name} {percent(value)}" for name, value in last.items() if number(value) is not None)


def _panels(stage: StageProgress, drawn: dict[str, tuple[Panel, ...]]) -> tuple[Panel, ...]:
    name = f"k{stage.key[:SHORTEST_KEY]}"
    if stage.state == "running":
        return (*panels({"stages": []}, stage.result, name), *_loss_panel(stage, name))
    if stage.key not in drawn:
        drawn[stage.key] = panels({"stages": []}, stage.result, name)
    return drawn[stage.key]


def _loss_panel(stage: StageProgress, name: str) -> tuple[Panel, ...]:
    rest = iter(OTHER_COLORS * len(stage.losses))
    series = [
        Series(member, _thinned(points), ROLE_COLORS.get(member) or next(rest))
        for member, points in stage.losses.items()
        if len(points) > 1
    ]
    if not series:
        return ()
    label = "Loss at log points over steps: " + "; ".join(f"{s.label} now {s.points[-1][1]:.3g}" for s in series)
    svg = figures.lines(f"{name}-log", label, series, (), "step", percent=False)
    return (Panel("Loss at log points", Markup(svg), tuple(series), "Means since the log point before."),)


def _thinned(points: Sequence[tuple[int, float]]) -> Points:
    """Evenly few of them, and the last."""
    stride = -(-len(points) // MOST_POINTS)
    return tuple(points[::-stride][::-1])
