"""The observer tensorboard: a sub-run a stage, every step once, and nothing at all without the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small import RECIPE, die_at_step_30, make_run, weights

from kdcore.plugins import load_plugins

FILE = Path(__file__).parents[1] / "plugins" / "kdcore_tensorboard" / "__init__.py"
SETS = ["train.epochs=4", "execute.checkpoint_seconds=0"]
GUIDED = {**RECIPE, "controller": [{"name": "earlystop", "fraction": 0.4}]}


@pytest.fixture
def host(install):
    """The plugin as installed, and no other observer."""
    install("board", FILE.read_text())
    return load_plugins(block=["tensorboard"])


def kill(made):
    """Runs it until some steps after a checkpoint of the student, where the process dies without a word."""
    die_at_step_30(made)
    sys.modules["board_module"].boards.clear()


# ---------------------------------------------------------------- with a writer that remembers


class Writer:
    """Remembers scalars; ``purge_step`` is obeyed as TensorBoard obeys it."""

    kept: dict = {}  # noqa: RUF012

    def __init__(self, folder, purge_step):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in self.kept.get(folder, []) if row[1] < purge_step]
        self.kept[folder] = self.rows

    def add_scalar(self, tag, value, step):
        self.rows.append((tag, step, value))

    def add_text(self, tag, text, step):
        self.rows.append((tag, step, text))

    def flush(self):
        pass

    def close(self):
        pass


@pytest.fixture
def writer(host, monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(sys.modules["board_module"], "is_installed", lambda: True)
    monkeypatch.setattr(Writer, "kept", {})
    return Writer


def rows(writer, name):
    return next(rows for folder, rows in writer.kept.items() if Path(folder).name.startswith(f"{name}-"))


def test_every_log_line_and_tick_is_there_at_its_step(tmp_path, host, writer):
    made = make_run(tmp_path, host=host, sets=SETS, recipe=GUIDED)
    result = made.execute()
    assert not host.muted
    found = rows(writer, "mlp-2-mlp-1")
    logs = [event for event in made.console.kinds("log") if "->" in event["name"]]
    for tag, name in (("student/train.kd", "student.kd"), ("images_per_second", "images_per_second")):
        expected = [(tag, event["step"], event["metrics"][name]) for event in logs if name in event["metrics"]]
        assert [row for row in found if row[0] == tag] == expected
    stage = result["stages"][-1]
    ticks = [event["step"] for event in made.console.kinds("tick") if "->" in event["name"]]
    for metric in ("accuracy", "loss", "lr"):
        values = [row[metric] for row in stage["members"]["student"]["curve"]]
        assert [row[1:] for row in found if row[0] == f"student/{metric}"] == list(zip(ticks, values, strict=True))
    (text,) = [row for row in found if row[0] == "decisions"]
    assert "step 22: set student.kd.weight 0.0 (2 of 4 epochs are over)" in text[2]
    assert len({row[:2] for row in found}) == len(found)


def test_a_killed_run_goes_on_without_doubled_steps(tmp_path, host, writer):
    make_run(tmp_path / "whole", host=host, sets=SETS, recipe=GUIDED).execute()
    expected = [(tag, step) for tag, step, _ in rows(writer, "mlp-2-mlp-1")]
    writer.kept.clear()
    made = make_run(tmp_path / "killed", host=host, sets=SETS, recipe=GUIDED)
    kill(made)
    make_run(tmp_path / "killed", host=host, sets=SETS, recipe=GUIDED).execute()
    assert [(tag, step) for tag, step, _ in rows(writer, "mlp-2-mlp-1")] == expected


def test_a_reused_stage_shows_its_curves_once(tmp_path, host, writer):
    make_run(tmp_path, host=host, sets=SETS, name="first").execute()
    writer.kept.clear()
    result = make_run(tmp_path, host=host, sets=SETS).execute()
    again = rows(writer, "mlp-2-on-labels")
    curve = result["stages"][0]["members"]["teacher"]["curve"]
    steps = result["stages"][0]["steps"]
    assert [row[1:] for row in again if row[0] == "teacher/accuracy"] == [
        (steps * (n + 1) // 4, row["accuracy"]) for n, row in enumerate(curve)
    ]
    writer.kept.clear()
    make_run(tmp_path, host=host, sets=SETS).execute()
    assert not writer.kept


def test_two_runs_in_one_process_do_not_meet(tmp_path, host, writer):
    module = sys.modules["board_module"]
    stage = {"key": "k" * 64, "name": "s"}
    for name in ("a", "b"):
        module.kdcore_log_line({"dir": str(tmp_path / name)}, stage, 5, {"student.loss": 1.0})
    module.kdcore_run_finished({"dir": str(tmp_path / "a")})
    assert list(module.boards) == [tmp_path / "b" / "tensorboard" / "s-kkkkkkkk"]
    module.kdcore_stage_started({"dir": str(tmp_path / "b")}, stage)
    assert not module.boards


def test_without_tensorboard_a_run_says_and_writes_nothing_of_it(tmp_path, host, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["board_module"], "find_spec", lambda name: None)
    result = make_run(tmp_path, host=host).execute()
    assert result["degraded"] == {}
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert capsys.readouterr().err == ""


def test_a_writer_that_fails_ends_no_run(tmp_path, host, writer, monkeypatch):
    def fail(*arguments):
        raise OSError("no disk")

    monkeypatch.setattr(writer, "add_scalar", fail)
    result = make_run(tmp_path, host=host).execute()
    assert "no disk" in result["degraded"]["board"]
    assert weights(tmp_path)


def test_loading_the_plugin_imports_neither_torch_nor_tensorboard(shell):
    names = "[m for m in ('torch', 'tensorboard', 'numpy', 'kdcore_tensorboard') if m in sys.modules]"
    code = f"import sys; sys.path.insert(0, {str(FILE.parents[1])!r}); import kdcore_tensorboard; print({names})"
    assert shell("-c", code).out == "['kdcore_tensorboard']\n"


# ---------------------------------------------------------------- with TensorBoard itself


def test_event_files_read_back_say_what_metrics_jsonl_says(tmp_path, host):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = make_run(tmp_path, host=host, sets=SETS, recipe=GUIDED)
    kill(made)
    make_run(tmp_path, host=host, sets=SETS, recipe=GUIDED).execute()
    assert not host.muted
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(next(tmp_path.glob("run/tensorboard/mlp-2-mlp-1-*"))))
    board.Reload()
    logged = {x["step"]: x["values"] for x in lines if x["kind"] == "log" and x["member"] == "student"}
    ticks = {x["step"]: x["values"] for x in lines if x["kind"] == "tick" and x["member"] == "student"}
    for metric, tag, wanted in (("loss", "train.loss", logged), ("accuracy", "accuracy", ticks), ("lr", "lr", ticks)):
        found = board.Scalars(f"student/{tag}")
        expected = [(step, values[metric]) for step, values in sorted(wanted.items()) if metric in values]
        assert [event.step for event in found] == [step for step, _ in expected]
        assert [event.value for event in found] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert "decisions/text_summary" in board.Tags()["tensors"]
