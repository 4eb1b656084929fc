"""A run's result as one HTML file that needs nothing else: no network, no script, no second file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import StorageError


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes the report of ``result`` (the content of result.json). The same result gives the same bytes."""
    text = render(result)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"the report cannot be written: {error}", where=str(path)) from error


def render(result: Mapping[str, Any]) -> str:
    """The report as text."""
    from jinja2 import Environment, StrictUndefined

    from .page import view

    source = resources.files(__name__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return env.from_string(source).render(view(result))
