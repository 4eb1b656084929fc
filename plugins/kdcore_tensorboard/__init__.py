"""Observer ``tensorboard``: a run's curves as event files under RUN/tensorboard, one sub-run a stage.

It acts where the package tensorboard can be imported (the extra ``tensorboard`` of kdcore) and is silent elsewhere.
Every scalar stands at the step at which it was measured. A stage that goes on after a kill does some steps again; its
new event file begins with the order to forget what older ones say of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kdcore

KDCORE_HOOKS = 1


class Board:
    """The event file of a stage.

    Args:
        folder: of its sub-run.
        step: what older files of it say of this step and later ones is forgotten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # tensorboard's import takes a while: at the first line alone

        self.writer = SummaryWriter(str(folder), purge_step=step)
        self.step = step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by tag; they are in the file on return, so that a kill takes nothing of an earlier step."""
        self.step = step
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


boards: dict[Path, Board] = {}
"""The open ones, by folder."""


@cache  # a search that finds nothing takes longer than all else that a line costs
def is_installed() -> bool:
    return find_spec("tensorboard") is not None


def board_of(folder: Path, step: int) -> Board | None:
    """The stage's board, opened at its first line; None without tensorboard."""
    if folder not in boards and is_installed():
        boards[folder] = Board(folder, step)
    return boards.get(folder)


def folder_of(run: Mapping[str, Any], stage: Mapping[str, Any]) -> Path:
    name = re.sub(r"[^A-Za-z0-9._]+", "-", stage["name"]).strip("-")
    return Path(run["dir"], "tensorboard", f"{name}-{stage['key'][:8]}")


def monitored(member: str, row: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """A row of a curve by tags, without what the lines of its steps said."""
    yield from ((f"{member}/{k}", v) for k, v in row.items() if k not in ("tick", "epoch") and k[:6] != "train.")


@kdcore.hookimpl
def kdcore_stage_started(run: Mapping[str, Any], stage: Mapping[str, Any]) -> None:
    close(folder_of(run, stage))  # its worker died, and it goes on from an earlier step


@kdcore.hookimpl
def kdcore_log_line(run: Mapping[str, Any], stage: Mapping[str, Any], step: int, metrics: Mapping[str, float]) -> None:
    board = board_of(folder_of(run, stage), step)
    if board is not None:  # "student.kd" is a member's train loss, "images_per_second" the stage's
        board.scalars(step, {name.replace(".", "/train.", 1): value for name, value in metrics.items()})


@kdcore.hookimpl
def kdcore_epoch_finished(
    run: Mapping[str, Any], stage: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]
) -> None:
    board = boards.get(folder_of(run, stage))
    if board is not None:  # the line of the tick's last step came just before
        board.scalars(board.step, dict(pair for member, row in metrics.items() for pair in monitored(member, row)))


@kdcore.hookimpl
def kdcore_stage_finished(run: Mapping[str, Any], stage: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    folder = folder_of(run, stage)
    if result["reused"] and not folder.exists():
        copy_curves(folder, result)
    if folder in boards and result["events"]:
        said = [f"- step {e['step']}: {e['kind']} {e['target']} {e['value']} ({e['reason']})" for e in result["events"]]
        boards[folder].writer.add_text("decisions", "\n".join(said), result["steps"])
    close(folder)


def copy_curves(folder: Path, result: Mapping[str, Any]) -> None:
    """The curves of a stage that another run trained."""
    for name, member in result["members"].items():
        for row in member["curve"]:
            step = round(row["tick"] * result["steps"] / result["ticks"])
            board = board_of(folder, step)
            if board is not None:
                board.scalars(step, {f"{name}/{k}": v for k, v in row.items() if k not in ("tick", "epoch")})


@kdcore.hookimpl
def kdcore_run_finished(run: Mapping[str, Any]) -> None:
    for folder in [folder for folder in boards if Path(run["dir"]) in folder.parents]:
        close(folder)


def close(folder: Path) -> None:
    if folder in boards:
        boards.pop(folder).close()
