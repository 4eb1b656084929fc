"""Progress: one line a stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..chains import ends_distillation, learners
from ..job import Event
from ..report.formats import counted
from .tree import choice_text

PLAIN_SECONDS = 5.0
SILENT_SECONDS = 20.0  # after which a line says how far an epoch is
ASCII = str.maketrans({"±": "+-", "├": "|", "└": "`", "─": "-", "│": "|"})


class RunConsole:
    """Shows the events of a run. Use it as a context manager.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        # rich draws in a notebook by ipywidgets, and warns where there are none
        self.live = self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[tick]}/{task.total:.0f}"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.speed: dict[str, float] = {}
        self.found: dict[str, str] = {}
        self.said = time.monotonic()
        self.printed: dict[str, float] = {}
        self.asked: dict[str, Any] = {}
        self.stops: set[tuple[Any, ...]] = set()

    def __enter__(self) -> RunConsole:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.progress.stop()

    def handle(self, event: Event) -> None:
        """Shows one event."""
        show = getattr(self, f"_{event['kind']}", None)
        if show is not None:
            with suppress(SystemExit):  # rich's way to say that nobody reads the pipe any more: train on in silence
                show(event)

    def _print(self, text: str, style: str = "") -> None:
        self.said = time.monotonic()
        text = plain(text, self.console.options.ascii_only)
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _warning(self, event: Event) -> None:
        stage = f"{event['name']}: " if event.get("name") else ""
        self._print(f"WARNING  {stage}{event['text']}", "bold yellow")

    def _note(self, event: Event) -> None:
        self._print(f"{event['name']}: {event['text']}")

    def _waiting(self, event: Event) -> None:
        self._print(f"{event['name']}: {event['text']}")

    def _reading(self, event: Event) -> None:
        """Samples that were read of a split; a short one is read before a line would be."""
        if time.monotonic() - self.printed.setdefault(event["name"], time.monotonic()) > PLAIN_SECONDS:
            self.printed[event["name"]] = time.monotonic()
            self._print(f"reading {event['name']}: {event['done']:,}/{event['total']:,}")

    def _stage_started(self, event: Event) -> None:
        resumed = f", goes on from step {event['step']}" if event["step"] else ""
        if self.live:
            if event["key"] in self.tasks:  # another try
                self.progress.remove_task(self.tasks[event["key"]])
            at = {"completed": event["tick"], "tick": event["tick"]}
            self.tasks[event["key"]] = self.progress.add_task(event["name"], total=event["ticks"], text=resumed, **at)
        else:
            self._print(f"{event['name']}: {counted(event['ticks'], 'epoch')}{resumed}")

    def _log(self, event: Event) -> None:
        """How far an epoch is, on a terminal; elsewhere where nothing else was said for a while."""
        key, done = event["key"], event["done"]
        self.speed[key] = event["metrics"]["images_per_second"]
        if key in self.tasks:
            self.progress.update(self.tasks[key], completed=done, text=self._state(key))
        elif done % 1 and not self.live and time.monotonic() - self.said > SILENT_SECONDS:
            epoch = f"epoch {int(done) + 1}/{event['ticks']}, {done % 1:.0%} of it"
            self._print(f"{event['name']}: {epoch}, {self.speed[key]:,.0f} img/s")

    def _state(self, key: str) -> str:
        return f"{self.found.get(key, '')}  {self.speed.get(key, 0):,.0f} img/s"

    def _tick(self, event: Event) -> None:
        self.found[event["key"]] = _metrics(event["metrics"])
        text = self._state(event["key"])
        if self.live:
            self.progress.update(self.tasks[event["key"]], completed=event["tick"], tick=event["tick"], text=text)
        elif time.monotonic() - self.printed.get(event["key"], 0.0) > PLAIN_SECONDS:
            self.printed[event["key"]] = time.monotonic()
            self._print(f"{event['name']}: {event['tick']}/{event['ticks']}  {text}")

    def _asked(self, event: Event) -> None:
        self.asked |= {stage["key"]: stage for stage in event["stages"]}

    def _decision(self, event: Event) -> None:
        """One line a decision; a stop is often several, of one controller for one reason, and takes one line too."""
        row, stage = event["event"], self.asked.get(event["key"])
        cause = event["key"], row["tick"], row["controller"], row["reason"]
        if cause in self.stops:
            return
        what = f"{row['target']} = {row['value']}" if row["kind"] == "set" else f"{row['kind']} {row['target']}"
        if stage is not None and learners(stage) and ends_distillation(stage, row):
            self.stops.add(cause)
            what = "distillation stopped"
        self._print(f"{event['name']}: epoch {row['tick']}: {row['controller']}: {what} ({row['reason']})", "cyan")

    def _choice(self, event: Event) -> None:
        self._print(choice_text(event), "bold cyan")

    def _best_so_far(self, event: Event) -> None:
        student = Path(event["folder"]) / "student.safetensors"
        self._print(f"Best so far: {event['text']}. Its weights are {student}.", "bold")
        self._print(f"To go on: kdcore resume {event['folder']}")

    def _stage_finished(self, event: Event) -> None:
        result = event["result"]
        how = "from the store" if result["reused"] else f"{result['seconds']:.1f} s"
        found = "  ".join(
            f"{name} {member['monitor_accuracy']:.2%}"
            for name, member in result["members"].items()
            if member["trained"] and member["monitor_accuracy"] is not None
        )
        if event["key"] in self.tasks:
            self.progress.remove_task(self.tasks.pop(event["key"]))
        self._print(f"{event['name']}: {f'{found} on the monitor split' if found else 'done'} ({how})")

    def outcome(self, result: dict[str, Any], folder: Path) -> None:
        """What a finished run found, and where it lies."""
        from ..report.page import lede

        for text in [text for text in result["warnings"] if text.startswith("the student")]:
            self.handle({"kind": "warning", "text": text})
        self._table(result)
        with suppress(SystemExit):
            if said := lede(result):
                self._print(said)
            seconds = result["run"]["seconds"]
            text = f"{folder / 'report.html'} ({seconds:.1f} s; result.json and student.safetensors lie beside it)"
            self._print(text)

    def _table(self, result: dict[str, Any]) -> None:
        """The headline table."""
        table = Table("", "model", "test accuracy", "monitor", "parameters", "MFLOPs")
        for role in ("teacher", "control", "student"):
            row = result[role]
            if row is not None:
                accuracy = f"{row['test_accuracy']:.2%}", f"{row['monitor_accuracy']:.2%}"
                table.add_row(role, row["model"], *accuracy, f"{row['params']:,}", f"{row['flops'] / 1e6:,.2f}")
        with suppress(SystemExit):
            self.console.print(table)
            if result["replicates"]:
                from .compare import chains_table

                self.console.print(chains_table(result))


def plain(text: str, ascii_only: bool) -> str:
    """The text for a terminal that may know ASCII alone."""
    return text.translate(ASCII) if ascii_only else text


def _metrics(metrics: dict[str, dict[str, float]]) -> str:
    parts = []
    for name, row in metrics.items():
        accuracy = f" acc {row['accuracy']:.2%}" if "accuracy" in row else ""
        parts.append(f"{name}: loss {row.get('train.loss', float('nan')):.3f}{accuracy}")
    return "  ".join(parts)
