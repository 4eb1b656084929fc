"""What a run says while it goes on."""

from __future__ import annotations

import pytest

from kdcore.cli import console
from kdcore.cli.console import RunConsole
from kdcore.cli.treeconsole import TreeConsole


def log(done):
    metrics = {"images_per_second": 1234.4}
    return {"kind": "log", "key": "k", "name": "t -> s", "step": 50, "ticks": 30, "done": done, "metrics": metrics}


@pytest.mark.parametrize("kind", [RunConsole, TreeConsole])
def test_an_epoch_of_minutes_is_heard_of_every_20_seconds(kind, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with kind() as shown:
        for now[0] in (5.0, 19.0, 21.0, 30.0, 42.0):
            shown.handle(log(2 + now[0] / 100))
        now[0] = 90.0
        shown.handle(log(3.0))  # the line of the epoch follows
    assert capsys.readouterr().out.splitlines() == [
        "t -> s: epoch 3/30, 21% of it, 1,234 img/s",
        "t -> s: epoch 3/30, 42% of it, 1,234 img/s",
    ]


def test_the_bar_moves_within_an_epoch():
    shown = RunConsole()
    shown.live = True
    shown.handle({"kind": "stage_started", "key": "k", "name": "s", "step": 0, "tick": 0, "ticks": 30, "events": []})
    shown.handle(log(0.5))
    task = shown.progress.tasks[0]
    assert (task.completed, task.fields["tick"], task.total) == (0.5, 0, 30)
