"""Small runs for tests: a recipe, a host and a runner without a command line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from kdcore.machine import make_context, make_settings
from kdcore.plugins import PluginHost, load_plugins
from kdcore.recipe import load
from kdcore.runner import Run

PROOFS = Path(__file__).parent / "coming" / "proofs.py"

RECIPE: dict[str, Any] = {
    "seed": 0,
    "threads": 1,
    "data": {"name": "digits", "batch_size": 128},
    "teacher": {"model": "mlp", "size": 2, "width": 32},
    "student": {"model": "mlp", "size": 1},
    "train": {"epochs": 2},
    "execute": {"log_every": 5},
    "objective": [{"loss": "cross_entropy"}, {"loss": "kd"}],
}


class Quiet:
    """A console that remembers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def handle(self, event: Any) -> None:
        self.events.append(dict(event))

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


def make_run(
    root: Path,
    *,
    sets: Iterable[str] = (),
    recipe: dict[str, Any] | None = None,
    host: PluginHost | None = None,
    jobs: int = 1,
    name: str = "run",
    **settings: Any,
) -> Run:
    """A run in ``root/name`` with the store in ``root/store``."""
    host = host or load_plugins()
    checked = load(recipe or RECIPE, list(sets))
    plugin_files = [str(path) for origin in host.origins.values() for path in origin.files if path.suffix == ".py"]
    made = make_settings(checked, root / "store", jobs, plugin_files=tuple(plugin_files), **settings)
    return Run(checked, host, made, root / name, Quiet(), jobs, make_context(host))


def die_at_step_30(made: Run) -> None:
    """Executes a run until some steps after a checkpoint of the student, where the process dies without a word."""
    handle = made.console.handle

    def die(event: Any) -> None:
        handle(event)
        if event["kind"] == "log" and "->" in event["name"] and event["step"] == 30:
            raise KeyboardInterrupt

    made.console.handle = die
    with pytest.raises(KeyboardInterrupt):
        made.execute()


def weights(root: Path, member: str = "student") -> list[str]:
    """Hashes of a member's weights in every stored result; what was set aside has a longer name."""
    found = root.glob(f"store/results/*/{member}.safetensors")
    return sorted(file_hash(path) for path in found if len(path.parent.name) == 64)


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
