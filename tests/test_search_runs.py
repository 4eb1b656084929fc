"""Searches that train: what is trained once, jobs, interruption, what a recipe may get wrong, and the plan."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kdcore_search import Search
from small import file_hash, make_run
from test_readme import blocks

from kdcore.errors import Interrupted, RecipeError

HERE = Path(__file__).parent
SIZES = (2, 4, 3)


def mlp(size: int) -> dict[str, Any]:
    return {"model": "mlp", "size": size, "width": 16}


RECIPE: dict[str, Any] = {
    "threads": 1,
    "data": {"name": "digits", "batch_size": 128},
    "teacher": mlp(5),
    "student": {"model": "mlp", "size": 1},
    "train": {"epochs": 2, "lr": 0.1},
    "execute": {"log_every": 5, "checkpoint_seconds": 0},
    "objective": [{"loss": "cross_entropy"}, {"loss": "kd"}],
    "strategy": {"name": "search", "mode": "exhaustive", "candidates": [*map(mlp, SIZES)]},
    "controller": [{"name": "dskd", "patience": 1}],
}
TOML = """
threads = 1
data = { name = "digits", batch_size = 128 }
teacher = { model = "mlp", size = 4, width = 16 }
student = { model = "mlp", size = 1 }
train = { epochs = 1 }
controller = ["dskd"]
[strategy]
name = "search"
mode = "exhaustive"
candidates = [{ model = "mlp", size = 3, width = 16 }, { model = "mlp", size = 2, width = 16 }]
"""


def searched(root, recipe=RECIPE, **changes):
    run = make_run(root, recipe=recipe, **changes)
    return run, run.execute()


def starts(run) -> list[str]:
    return [record["key"] for record in run.journal.of("start")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search by two workers that nobody stops."""
    return searched(tmp_path_factory.mktemp("whole"), jobs=2)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A search by this process that Ctrl-C ends in its 14th stage."""
    run, begun = make_run(tmp_path_factory.mktemp("interrupted"), recipe=RECIPE), []
    run.context = dataclasses.replace(run.context, stopped=lambda: 2 if len(begun) >= 14 else 0)
    handle = run.console.handle

    def count(event):
        handle(event)
        if event["kind"] == "stage_started":
            begun.append(event)

    run.console.handle = count
    with pytest.raises(Interrupted):
        run.execute()
    return run, file_hash(run.folder / "student.safetensors")


@pytest.fixture(scope="module")
def resumed(interrupted):
    """The same search, by the same command, to its end."""
    return searched(interrupted[0].folder.parent)


def test_exhaustive_over_three_candidates_trains_16_stages_and_a_control_a_size(whole):
    run, result = whole
    begun, members = starts(run), {stage["key"]: set(stage["members"]) for stage in result["stages"]}
    assert len(begun) == len(set(begun)) == 20
    controls = [key for key in begun if members[key] == {"control"}]
    assert len(begun) - len(controls) == 16
    assert sorted(run.stages[key].members["control"].model.options["size"] for key in controls) == [1, 2, 3, 4]
    evidence = {"chains": 8, "chains_skipped": 0, "stages": 16, "stages_without_sharing": 28, "controls": 4}
    assert result["evidence"] == evidence


def test_every_chains_student_is_reported_and_the_best_is_delivered(whole):
    run, result = whole
    students = {name: replicates[0] for name, replicates in result["replicates"].items()}
    assert len(students) == 8
    best = max(student["monitor_accuracy"] for student in students.values())
    assert result["student"]["monitor_accuracy"] == next(iter(students.values()))["monitor_accuracy"] == best
    assert next(iter(students)) in result["note"]
    assert all(choice["error"] > 0 for choice in result["choices"] if choice["margin"])
    assert file_hash(run.folder / "student.safetensors") == delivered_hash(run)


def delivered_hash(run) -> str:
    """Of the stored weights of the last choice's best."""
    best = run.choices[-1].best
    return file_hash(run.store.weights(run.keys.of(best.stage), best.member))


def test_no_stage_costs_more_than_its_estimate(whole):
    run, result = whole
    spent = {stage["key"]: sum(stage["flops"].values()) for stage in result["stages"]}
    for key, stage in run.stages.items():
        assert 0 < spent[key] <= run.view.estimate(stage)
    stopped = [stage for stage in result["stages"] if stage["events"]]
    assert stopped
    assert all(
        spent[s["key"]] < run.view.estimate(run.stages[s["key"]]) for s in stopped if s["events"][0]["tick"] == 1
    )


@pytest.mark.long
def test_one_job_and_two_end_with_the_same_chain_decisions_and_weights(whole, resumed):
    (one, told), (two, result) = resumed, whole
    for name in ("note", "choices", "evidence"):
        assert told[name] == result[name]
    assert [*told["replicates"]] == [*result["replicates"]]
    student = "student.safetensors"
    assert file_hash(one.folder / student) == file_hash(two.folder / student)


def test_another_mode_takes_what_is_there_and_trains_the_baseline_alone(whole):
    recipe = {**RECIPE, "strategy": {**RECIPE["strategy"], "mode": "greedy", "baseline": True, "assistants": 1}}
    run, result = searched(whole[0].folder.parent, recipe, name="greedy")
    trained = [run.stages[key] for key in starts(run)]
    assert len(trained) == 7
    assert not any(stage.controllers or stage.uses for stage in trained)
    names = [*result["replicates"]]
    assert names[4] == f"{names[0]} without dskd"
    assert len(names) == 8


# ---------------------------------------------------------------- interruption


def test_ctrl_c_leaves_the_best_student_so_far(interrupted):
    run, weights = interrupted
    (event,) = run.console.kinds("best_so_far")
    assert event["text"] == run.choices[-1].text
    assert len(run.choices) > 1
    assert weights == delivered_hash(run)


def test_after_ctrl_c_the_same_command_goes_on_and_starts_no_finished_stage(interrupted, resumed):
    first, again = interrupted[0], resumed[0]
    finished, begun = {record["key"] for record in first.journal.of("result")}, len(starts(first))
    new = [*again.journal.of("start")][begun:]
    assert not finished & {record["key"] for record in new}
    assert new[0]["key"] == starts(first)[-1]
    assert new[0]["step"] > 0


@pytest.mark.parametrize("kills", [3, pytest.param(8, marks=pytest.mark.long)])
def test_a_search_killed_anywhere_ends_with_the_same_chain_and_weights(kills):
    searches = 1 if kills == 3 else 6
    command = [sys.executable, "-W", "ignore", str(HERE / "kill_search.py"), str(searches), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{searches}/{searches}\n")


# ---------------------------------------------------------------- recipes


def test_sizes_are_checked_before_anything_is_trained(tmp_path):
    recipe = {**RECIPE, "strategy": {"name": "search", "candidates": [mlp(2), mlp(7)]}}
    run = make_run(tmp_path, recipe=recipe)
    with pytest.raises(RecipeError, match=r"strategy\.candidates\[1\]: mlp-7 has 2,570 parameters, not between mlp-1"):
        run.execute()
    assert not starts(run)


def test_a_misspelt_candidate_is_found_without_torch(tmp_path):
    (tmp_path / "r.toml").write_text(TOML.replace('"mlp", size = 2', '"mpl", size = 2'))
    code = f"""
import sys
from pathlib import Path
from kdcore import RecipeError
from kdcore.cli.drive import check
from kdcore.plugins import load_plugins
try:
    check(Path({str(tmp_path / "r.toml")!r}), [], load_plugins())
except RecipeError as error:
    print(error)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("strategy.candidates[1].model: ")
    assert "'mpl'" in done.stdout


def test_a_plan_shows_the_longest_search_that_the_budget_pays(tmp_path, cli):
    path = tmp_path / "r.toml"
    path.write_text(TOML)
    lengths = []
    for sets in ([], ["--set", "strategy.budget.stages=6"]):
        done = cli("plan", path, *sets)
        assert done.code == 0, done.err
        lengths.append(sum("mlp-" in line for line in done.out.splitlines()))
    assert lengths == [11, 6]


def test_the_guide_names_every_option_and_its_recipe_is_right(tmp_path, cli):
    guide = (HERE.parent / "docs" / "search.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", guide, re.M) == [*Search.Options.model_fields]
    (tmp_path / "guide.toml").write_text(*blocks("toml", guide))
    done = cli("plan", tmp_path / "guide.toml")
    assert done.code == 0, done.err
    assert "mlp-6 > cnn-2 > mlp-4 > mlp-3 > mlp-2" in done.out
