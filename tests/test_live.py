"""The page of a run that is not finished: made from its files alone, and replaced by the final one."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
from small import RECIPE, make_run
from test_report import FETCHING, Page

from kdcore.errors import Interrupted
from kdcore.progress import is_finished, look
from kdcore.record import Record
from kdcore.report import live

SETS = ["train.epochs=6", "execute.checkpoint_seconds=0"]
GUIDED = {**RECIPE, "controller": [{"name": "earlystop", "fraction": 0.4}]}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The root of a run that was stopped in its student's fourth epoch, its teacher done."""
    root = tmp_path_factory.mktemp("stopped")
    made = make_run(root, sets=SETS, recipe=GUIDED)
    ticks = made.console.kinds
    made.context.stopped = lambda: 15 if sum("->" in event["name"] for event in ticks("tick")) >= 4 else 0
    with pytest.raises(Interrupted):
        made.execute()
    return root


@pytest.fixture
def root(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run" / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "store": str(tmp_path / "store")}))
    return tmp_path


def page(root):
    return Page((root / "run" / "report.html").read_text(encoding="utf-8"))


def test_the_page_says_that_the_run_is_not_finished_and_how_far_it_is(root, cli):
    done = cli("report", root / "run")
    assert (done.code, done.out) == (0, f"{root / 'run' / 'report.html'}\n")
    found = page(root)
    assert "This run is not finished. Stages done: 1 of the 2 asked for so far." in found.text
    assert found.row("mlp-2 on labels")[:2] == ["finished", "6 of 6 epochs"]
    assert found.row("mlp-2 -> mlp-1")[:2] == ["running", "4 of 6 epochs"]
    assert found.row("mlp-2 -> mlp-1")[2].startswith("student ")
    assert found.row("mlp-2 -> mlp-1")[3] == "–"
    for title in ("Monitor accuracy", "Train loss", "Loss at log points", "Gradient share: student"):
        assert title in found.text
    assert "student.kd.weight = 0.0" in found.text
    assert "Begun 20" in found.text
    assert not FETCHING & set(found.tags)
    assert len(found.ids) == len(set(found.ids))
    assert ("http-equiv", "refresh") in found.attributes


def test_the_page_has_the_choices_of_the_process_that_goes_on(root, cli):
    record = Record(root / "run", pytest.fail)
    choice = {"kind": "choice", "text": "6-4-2 instead of 6-2", "margin": 0.01, "error": 0.02, "is_noise": True}
    for _ in range(2):  # a resume makes them again
        record.begin()
        record.event(choice)
    cli("report", root / "run")
    assert page(root).row("6-4-2 instead of 6-2") == ["+1.00\u00a0±\u00a02.00", "within noise"]
    assert len([row for row in page(root).rows if row[0] == choice["text"]]) == 1


def test_a_stage_that_waits_is_shown_and_warnings_too(root, cli):
    record = Record(root / "run", pytest.fail)
    record.begin()
    record.event({"kind": "warning", "name": "mlp-2 -> mlp-1", "key": "k", "text": "<b>the teacher knows nothing</b>"})
    cli("report", root / "run")
    assert page(root).row("mlp-2 -> mlp-1")[0] == "waiting"
    assert "mlp-2 -> mlp-1: <b>the teacher knows nothing</b>" in page(root).text
    assert "b" not in page(root).tags


def test_time_between_two_processes_is_not_time_at_work(root):
    before = look(root / "run", {})
    lines = (root / "run" / "metrics.jsonl").read_text().replace('"time": "20', '"time": "21')
    with (root / "run" / "metrics.jsonl").open("a") as file:
        file.write(lines)
    assert look(root / "run", {}).seconds < 2 * before.seconds + 1
    assert look(root / "run", {}).begun == before.begun


def test_a_run_without_a_single_line_has_a_page(root, cli):
    (root / "run" / "metrics.jsonl").unlink()
    cli("report", root / "run")
    assert page(root).row("mlp-2 -> mlp-1")[0] == "waiting"
    assert page(root).row("mlp-2 on labels")[0] == "finished"


def test_the_final_page_is_the_runs_own_byte_for_byte(root, cli):
    cli("report", root / "run")
    make_run(root, sets=SETS, recipe=GUIDED).execute()
    own = (root / "run" / "report.html").read_bytes()
    assert b"refresh" not in own
    for arguments in ((), ("--watch",)):
        (root / "run" / "report.html").unlink()
        assert cli("report", root / "run", *arguments).code == 0
        assert (root / "run" / "report.html").read_bytes() == own


def test_a_result_of_an_earlier_process_does_not_hide_that_the_run_goes_on(root):
    make_run(root, sets=SETS, recipe=GUIDED).execute()
    assert is_finished(root / "run")
    with (root / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"time": "2126-01-01T00:00:00.000Z", "kind": "run"}\n')
    assert not is_finished(root / "run")


@pytest.mark.parametrize("text", ["{}", "[]", "half a fi", '{"cwd": 3, "store": "store"}'])
def test_a_run_json_that_is_none_is_named(root, cli, text):
    (root / "run" / "run.json").write_text(text)
    done = cli("report", root / "run")
    assert done.code == 4
    assert "run.json: no run of kdcore" in done.err


def test_watching_renders_what_changed_until_the_run_is_finished(root, cli, monkeypatch):
    """The page is written when something is new, not otherwise; figures of a finished stage are drawn once."""
    pages, drawn = [], []
    write, panels = live.live_view, live.panels
    monkeypatch.setattr(live, "live_view", lambda *a: pages.append(a[0]) or write(*a))
    monkeypatch.setattr(live, "panels", lambda *a: drawn.append(a[1]["name"]) or panels(*a))

    def finish():
        wait(lambda: len(pages) == 1)
        time.sleep(0.5)
        assert len(pages) == 1
        Record(root / "run", pytest.fail).event({"kind": "warning", "text": "new"})
        wait(lambda: len(pages) == 2)
        make_run(root, sets=SETS, recipe=GUIDED).execute()

    other = threading.Thread(target=finish)
    other.start()
    monkeypatch.setattr("kdcore.cli.watch.LEAST_REST", 0)
    done = cli("report", root / "run", "--watch", "--seconds", 0.1)
    other.join()
    assert done.code == 0
    assert drawn.count("mlp-2 on labels") == 1
    assert "test accuracy" in page(root).text


def wait(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
