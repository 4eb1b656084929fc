"""A run as one HTML file that needs nothing else: no network, no script, no second file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replace_file

if TYPE_CHECKING:
    from ..progress import Progress


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes the report of ``result`` (the content of result.json). The same result gives the same bytes."""
    replace_file(path, render(result).encode("utf-8", errors="replace"))


def write_live(progress: Progress, path: Path, refresh: int, drawn: dict[str, Any]) -> None:
    """Writes the page of a run that is not finished; a browser loads it again every ``refresh`` seconds. ``drawn``
    keeps the figures of finished stages from one call to the next.
    """
    from .live import live_view

    page = _fill("live.html.jinja", live_view(progress, refresh, drawn))
    replace_file(path, page.encode("utf-8", errors="replace"))


def render(result: Mapping[str, Any]) -> str:
    """The report as text."""
    from .page import view

    return _fill("report.html.jinja", view(result))


def _fill(template: str, view: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    loader = FunctionLoader(lambda name: resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return env.get_template(template).render(view)
