"""A run's result as one HTML file that needs nothing else: no network, no script, no second file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import replace_file


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes the report of ``result`` (the content of result.json). The same result gives the same bytes."""
    replace_file(path, render(result).encode("utf-8", errors="replace"))


def render(result: Mapping[str, Any]) -> str:
    """The report as text."""
    from jinja2 import Environment, StrictUndefined

    from .page import view

    source = resources.files(__name__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return env.from_string(source).render(view(result))
