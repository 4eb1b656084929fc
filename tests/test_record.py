"""The files that every run leaves for other tools: metrics.jsonl, live, and curves.csv, from its results."""

from __future__ import annotations

import csv
import errno
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import die_at_step_30, make_run, weights

from kdcore import record
from kdcore.errors import Interrupted
from kdcore.record import Record, read
from kdcore.testing.faults import failing_disk

LOG = {"kind": "log", "key": "a" * 64, "name": "stage", "step": 5}
SETS = ["execute.checkpoint_seconds=0", "train.epochs=4"]


def log(step, **metrics):
    return {**LOG, "step": step, "metrics": metrics}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = make_run(tmp_path_factory.mktemp("whole"), sets=SETS)
    return made, made.execute()


def steps(folder, kind="log"):
    """(stage, member, step, values) of the lines that count."""
    found = [line for line in read(folder) if line["kind"] == kind]
    values = [{k: v for k, v in line["values"].items() if k != "images_per_second"} for line in found]
    return [(x["stage"], x["member"], x["step"], v) for x, v in zip(found, values, strict=True)]


# ---------------------------------------------------------------- metrics.jsonl


def test_every_log_point_and_tick_of_every_member_is_a_line(whole):
    made, _ = whole
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "run"
    ticks, logs = made.console.kinds("tick"), made.console.kinds("log")
    found = [line for line in lines if line["kind"] == "tick"]
    assert [(x["stage"], x["key"], x["tick"], x["member"], x["values"]) for x in found] == [
        (e["name"], e["key"], e["tick"], member, row) for e in ticks for member, row in e["metrics"].items()
    ]
    student = [x for x in lines if x["kind"] == "log" and x["member"] == "student"]
    assert [{f"student.{k}": v for k, v in x["values"].items()} for x in student] == [
        {k: v for k, v in e["metrics"].items() if k != "images_per_second"} for e in logs if "->" in e["name"]
    ]
    speeds = [x["values"]["images_per_second"] for x in lines if x["kind"] == "log" and not x["member"]]
    assert speeds == [e["metrics"]["images_per_second"] for e in logs]
    assert [x["time"] for x in lines] == sorted(x["time"] for x in lines)


def test_after_a_kill_each_step_counts_once_with_the_uninterrupted_runs_values(whole, tmp_path):
    """The process dies without a word some steps after a checkpoint, in the middle of a line."""
    made = make_run(tmp_path, sets=SETS)
    die_at_step_30(made)
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"time": "2026-01-01T00:00:00.000Z", "ki')
    before = read(tmp_path / "run")
    make_run(tmp_path, sets=SETS).execute()
    assert before
    assert steps(tmp_path / "run") == steps(whole[0].folder)
    assert steps(tmp_path / "run", "tick") == steps(whole[0].folder, "tick")
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()].count("run") == 2


@given(st.binary(max_size=40).filter(lambda data: b"\n" not in data), st.integers(1, 30))
@settings(max_examples=30)
def test_a_torn_last_line_is_passed_over_and_cut_at_the_next_append(tmp_path_factory, torn, block):
    folder = tmp_path_factory.mktemp("torn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "BLOCK", block)
        Record(folder, pytest.fail).event(log(5, **{"student.loss": 1.0}))
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(torn)
        assert [line["step"] for line in read(folder)] == [5]
        Record(folder, pytest.fail).event(log(10, **{"student.loss": 0.5}))
    assert [line["step"] for line in read(folder)] == [5, 10]
    assert torn not in (folder / "metrics.jsonl").read_bytes() or len(torn) < 8


def test_a_line_of_rubbish_that_a_power_cut_left_hides_no_other(tmp_path):
    Record(tmp_path, pytest.fail).event(log(5, **{"student.loss": 1.0}))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\0\n17\n"time"\n{}\n')
    Record(tmp_path, pytest.fail).event(log(10, **{"student.loss": 0.5}))
    assert [line["step"] for line in read(tmp_path)] == [5, 10]


def _append(folder, member):
    for step in range(100):
        Record(folder, pytest.fail).event(log(step, **{f"{member}.loss": 1.0}))


def test_two_writers_of_one_run_leave_whole_lines(tmp_path):
    others = [threading.Thread(target=_append, args=(tmp_path, name)) for name in ("a", "b")]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(read(tmp_path)) == 200


def test_no_file_is_no_lines(tmp_path):
    assert read(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_lines_is_said_once_and_ends_nothing(tmp_path, code):
    said = []
    kept = Record(tmp_path, said.append)
    kept.event(log(5, **{"student.loss": 1.0}))
    with failing_disk(1, 1000, code):
        for step in (10, 15, 20):
            kept.event(log(step, **{"student.loss": 1.0}))
        kept.curves([])
    kept.event(log(25, **{"student.loss": 1.0}))
    assert [line["step"] for line in read(tmp_path)] == [5, 25]
    assert len(said) == 1
    assert "metrics.jsonl or curves.csv could not be written" in said[0]


def test_a_run_that_cannot_write_them_has_the_same_result(whole, tmp_path):
    folder = tmp_path / "run"
    for name in ("metrics.jsonl", "curves.csv"):
        (folder / name).mkdir(parents=True)
    made = make_run(tmp_path, sets=SETS)
    made.execute()
    assert weights(tmp_path) == weights(whole[0].folder.parent)
    texts = [event["text"] for event in made.console.kinds("warning")]
    assert len(texts) == 1
    assert "the run goes on without" in texts[0]


def test_the_documentation_names_every_kind_and_column(whole):
    text = (Path(__file__).parents[1] / "docs" / "observing.md").read_text()
    kinds = {line["kind"] for line in read(whole[0].folder)} | {"choice", "decision", "warning"}
    assert {"run", "start", "log", "tick"} <= kinds
    assert all(f"| `{kind}` |" in text for kind in kinds)
    assert all(f"`{column}`" in text for column in record.COLUMNS)


# ---------------------------------------------------------------- curves.csv


def test_curves_csv_is_every_value_of_every_curve(whole):
    made, result = whole
    with (made.folder / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (stage["name"], stage["key"], stage["seed"], name, row["tick"], row["epoch"], metric, value)
        for stage in result["stages"]
        for name, member in sorted(stage["members"].items())
        for row in member["curve"]
        for metric, value in sorted(row.items())
        if metric not in ("tick", "epoch")
    ]
    kinds = (str, str, int, str, int, float, str, float)
    assert [tuple(kind(row[c]) for kind, c in zip(kinds, record.COLUMNS, strict=True)) for row in rows] == expected
    assert {"accuracy", "loss", "lr", "train.loss", "train.kd"} <= {row["metric"] for row in rows}


def test_what_is_reused_is_written_to_curves_csv_at_once(whole):
    """Not once a stage: a long search that is taken up again would spend minutes on it."""
    again, written = make_run(whole[0].folder.parent, sets=SETS, name="again"), []
    again.record.curves = lambda results: written.append(len(list(results)))
    result = again.execute()
    assert written == [len(result["stages"])] == [2]


def test_curves_of_one_stage_under_two_seeds_are_told_apart(tmp_path):
    curve = [{"tick": 1, "epoch": 1.0, "accuracy": 0.5}]
    results = [{"key": f"k{seed}", "seed": seed, "members": {"student": {"curve": curve}}} for seed in (3, 4)]
    Record(tmp_path, pytest.fail).curves(("mlp-2 -> mlp-1", result) for result in results)
    with (tmp_path / "curves.csv").open(newline="") as file:
        found = [(row["stage"], row["seed"]) for row in csv.DictReader(file)]
    assert found == [("mlp-2 -> mlp-1", "3"), ("mlp-2 -> mlp-1", "4")]


def test_the_same_run_gives_the_same_curves_csv_resumed_or_reused(whole, tmp_path):
    expected = (whole[0].folder / "curves.csv").read_bytes()
    killed = make_run(tmp_path, sets=SETS)
    killed.context.stopped = lambda: 15 if len(killed.console.kinds("tick")) >= 6 else 0
    with pytest.raises(Interrupted):
        killed.execute()
    assert expected.startswith((tmp_path / "run" / "curves.csv").read_bytes())
    for _ in range(2):
        make_run(tmp_path, sets=SETS).execute()
        assert (tmp_path / "run" / "curves.csv").read_bytes() == expected
    changed = (tmp_path / "run" / "curves.csv").stat().st_mtime_ns
    make_run(tmp_path, sets=SETS, name="other").execute()
    assert (tmp_path / "other" / "curves.csv").read_bytes() == expected
    assert (tmp_path / "run" / "curves.csv").stat().st_mtime_ns == changed
