"""What a strategy decides and measures: choices, replicates, seconds, and what an interrupted run leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import ClassVar

import pytest
import torch
from small import RECIPE, die_at_step_30, file_hash, make_run, weights

from kdcore.errors import Interrupted, StorageError
from kdcore.plugins import load_plugins
from kdcore.stored import check_stored
from kdcore.training.member import Learner
from kdcore.training.stopwatch import Stopwatch

CHOOSER = """
import dataclasses
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.strategy("chooser", Chooser)

class Chooser:
    class Options(kdcore.Options):
        pass

    def plan(self, run, options):
        kinds = [run.model({"model": "mlp", "size": size}) for size in (1, 2)]
        kinds.sort(key=lambda model: run.measure(model).params, reverse=True)
        first = run.label_only("teacher", kinds[0])
        yield first
        views = [dataclasses.replace(run, seed=seed) for seed in (run.seed, run.seed + 1)]
        found = yield [view.distilled(kinds[1], first["teacher"]) for view in views]
        better = kdcore.paired_difference([found[0]["student"]], [found[1]["student"]])
        best = found[0]["student"].ref
        yield kdcore.Choice(f"{found[0].seconds:.9f} s", best, better.mean, better.error)
        refs = tuple(result["student"].ref for result in found)
        return kdcore.Outcome(best, first["teacher"], replicates={"direct": refs})
"""


def chooser(root):
    file = root / f"{root.name}.py"  # a module has one file in a process
    file.write_text(CHOOSER)
    host = load_plugins(files=[str(file)])
    return make_run(root, recipe={**RECIPE, "strategy": {"name": "chooser"}}, host=host)


def test_a_choice_is_shown_journalled_once_and_reported(tmp_path):
    first = chooser(tmp_path)
    result = first.execute()
    (choice,) = result["choices"]
    (event,) = first.console.kinds("choice")
    assert {"kind": "choice", **choice} == event
    assert 0 < choice["error"] < 0.2
    assert choice["is_noise"] == (abs(choice["margin"]) <= choice["error"])
    again = chooser(tmp_path)
    again.execute()
    assert [record["text"] for record in again.journal.of("choice")] == [choice["text"]]


def test_replicates_are_reported_with_their_seeds(tmp_path):
    result = chooser(tmp_path).execute()
    direct = result["replicates"]["direct"]
    assert [replicate["seed"] for replicate in direct] == result["protocol"]["seeds"] == [0, 1]
    assert direct[0]["test_accuracy"] == result["student"]["test_accuracy"]
    assert direct[0]["stage"] != direct[1]["stage"]


def lazy(root):
    """A run by a strategy that has nothing to compare, and asks for a replicate only by its outcome."""
    body = """
        yield first
        yield kdcore.Choice("no accuracy", first["teacher"], float("nan"), float("nan"))
        student = run.distilled(kinds[1], first["teacher"])
        refs = (student["student"],)
        return kdcore.Outcome(first["teacher"], replicates={"teacher": (first["teacher"],), "student": refs})
"""
    file = root / f"{root.name}.py"
    file.write_text(CHOOSER[: CHOOSER.index("        yield first")] + body.lstrip("\n"))
    return make_run(root, recipe={**RECIPE, "strategy": "chooser"}, host=load_plugins(files=[str(file)]))


def test_a_margin_that_is_not_a_number_is_unknown(tmp_path):
    (choice,) = lazy(tmp_path).execute()["choices"]
    assert (choice["margin"], choice["error"], choice["is_noise"]) == (None, None, False)


def test_a_replicate_that_nobody_asked_for_is_trained(tmp_path):
    (student,) = lazy(tmp_path).execute()["replicates"]["student"]
    assert student["model"] == "mlp-1"


@pytest.mark.parametrize("bits", ["", "AAAA", "no base64"])
def test_a_stored_result_whose_right_images_are_not_whole_is_refused(tmp_path, bits):
    """Anybody can seal a result; what is missing would count as wrong, and decide."""
    make_run(tmp_path).execute()
    (path,) = [p for p in tmp_path.glob("store/results/*/result.json") if '"student"' in p.read_text()]
    result = json.loads(path.read_text())
    assert check_stored(result, result["key"])
    result["members"]["student"]["monitor_correct"] = bits
    with pytest.raises(StorageError, match=r"members\.student: .*monitor_correct"):
        check_stored(result, result["key"])


def test_seconds_decide_as_they_did_the_first_time(tmp_path):
    """A result that was lost and is trained again takes another time; the strategy sees the journal's."""
    first = chooser(tmp_path)
    told = first.execute()["choices"]
    (key,) = [record["key"] for record in first.journal.of("result") if record["name"] == "mlp-2 -> mlp-1"][:1]
    shutil.rmtree(tmp_path / "store" / "results" / key)
    assert chooser(tmp_path).execute()["choices"] == told


def test_an_interrupted_run_leaves_the_best_student_so_far(tmp_path):
    run = chooser(tmp_path)
    handle = run.console.handle

    def interrupt(event):
        handle(event)
        if event["kind"] == "choice":
            raise Interrupted(2)

    run.console.handle = interrupt
    with pytest.raises(Interrupted):
        run.execute()
    assert run.console.kinds("best_so_far")[0]["folder"] == str(tmp_path / "run")
    assert file_hash(tmp_path / "run" / "student.safetensors") in weights(tmp_path)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_recipe_is_checked_up_to_the_first_measure_without_torch(tmp_path):
    (tmp_path / "chooser.py").write_text(CHOOSER)
    recipe = tmp_path / "r.toml"
    models = 'teacher = { model = "mlp", size = 2 }\nstudent = { model = "mlp", size = 1 }\n'
    recipe.write_text(f'data = {{ name = "digits" }}\n{models}strategy = "chooser"\n')
    code = f"""
import sys
from kdcore.cli.drive import check
from kdcore.plugins import load_plugins
check(__import__("pathlib").Path({str(recipe)!r}), [], load_plugins(files=[{str(tmp_path / "chooser.py")!r}]))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class FakeEvent:
    """Notes the stream that it is recorded in; its time is the number of events before it, in seconds."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream=None):
        self.stream, self.time = stream, len(self.made)
        self.made.append(self)

    def synchronize(self):
        assert self is self.made[-1]

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


def test_on_cuda_seconds_are_those_of_the_stages_own_device(monkeypatch):
    """Which may be cuda:1, while events are recorded in cuda:0's stream unless another is named."""
    monkeypatch.setattr(FakeEvent, "made", [])
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device=None: f"stream of {device}")
    watch, (one, two) = Stopwatch(torch.device("cuda:1")), (Learner(name, None, None) for name in ("one", "two"))
    for learner in (one, two, one):
        with watch.of(learner):
            pass
    with pytest.raises(KeyError), watch.of(two):
        raise KeyError
    assert one.seconds == 0
    watch.settle()
    watch.settle()
    assert (one.seconds, two.seconds) == (2, 2)
    assert {event.stream for event in FakeEvent.made} == {"stream of cuda:1"}


def test_the_seconds_of_members_hold_the_clipping_of_their_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda parameters, norm: time.sleep(0.01))
    stage = make_run(tmp_path, sets=["train.clip=0.1", "train.epochs=1"]).execute()["stages"][1]
    assert stage["member_seconds"]["student"] > 0.01 * stage["steps"]


def test_the_seconds_of_members_are_those_of_their_work_and_survive_a_kill(tmp_path):
    whole = make_run(tmp_path / "a", sets=["train.epochs=4"]).execute()["stages"][1]
    assert set(whole["member_seconds"]) == {"student", "teacher"}
    assert 0 < whole["member_seconds"]["teacher"] < whole["member_seconds"]["student"]
    assert sum(whole["member_seconds"].values()) < whole["seconds"]
    sets = ["train.epochs=4", "execute.checkpoint_seconds=0"]
    die_at_step_30(make_run(tmp_path / "b", sets=sets))
    state = json.loads(next((tmp_path / "b" / "store").rglob("state.json")).read_text())
    again = make_run(tmp_path / "b", sets=sets).execute()["stages"][1]
    for name, seconds in again["member_seconds"].items():
        assert seconds > state["members"][name]["seconds"] > 0
