"""What an objective promises: terms combine freely, with weights, warm-ups and schedules of their own."""

from __future__ import annotations

import math

import pytest
from small import RECIPE, file_hash, make_run

from kdcore.codec import encode
from kdcore.errors import RecipeError
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load

ENTROPY, KD = {"loss": "cross_entropy"}, {"loss": "kd", "weight": 4.0}


def recipe(*objective, **train):
    return {**RECIPE, "train": {"epochs": 4, **train}, "objective": list(objective)}


def compiled(table):
    view, _ = compile_recipe(load(table), load_plugins().catalog)
    return view


def weights(rows, term="kd"):
    """A term's weight at each epoch, from what was recorded beside cross-entropy of weight 1."""
    return [(row["train.loss"] - row["train.cross_entropy"]) / row[f"train.{term}"] for row in rows]


def student(result):
    return result["stages"][-1]["members"]["student"]


# ---------------------------------------------------------------- schedules of weights


def test_a_weight_is_its_value_times_warm_up_times_schedule(tmp_path):
    term = {**KD, "warmup_epochs": 2, "schedule": "cosine"}
    rows = student(make_run(tmp_path, recipe=recipe(ENTROPY, term)).execute())["curve"]
    cosine = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert weights(rows) == pytest.approx(
        [4 * ramp * c for ramp, c in zip([0.5, 1, 1, 1], cosine, strict=True)], rel=1e-3
    )


TURNER = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.controller("halver", Halver)
    registry.schedule("begin", lambda epoch, length, options: 1.0 if epoch < 1 else 0.0)

class Halver:
    needs = frozenset()

    def __init__(self, options):
        pass

    def decide(self, view):
        return [kdcore.Set("student.kd.weight", 2.0)] if view.tick == 2 else []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
"""


def test_a_schedule_trains_what_a_controller_at_the_same_epoch_trains(tmp_path, plugin_file):
    host = load_plugins(files=[plugin_file("turner", TURNER)])
    step = {**KD, "schedule": {"name": "step", "milestones": [2], "gamma": 0.5}}
    make_run(tmp_path / "schedule", recipe=recipe(ENTROPY, step)).execute()
    turned = {**recipe(ENTROPY, KD), "controller": [{"name": "halver"}]}
    make_run(tmp_path / "knob", recipe=turned, host=host).execute()
    make_run(tmp_path / "plain", recipe=recipe(ENTROPY, KD)).execute()
    hashes = [file_hash(tmp_path / name / "run" / "student.safetensors") for name in ("schedule", "knob", "plain")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_teacher_rests_while_its_schedule_is_zero(tmp_path, plugin_file):
    host = load_plugins(files=[plugin_file("turner", TURNER)])
    made = recipe(ENTROPY, {**KD, "schedule": "begin"})
    flops = make_run(tmp_path, recipe=made, host=host).execute()["stages"][-1]["flops"]
    assert "begin schedule" in (tmp_path / "run" / "report.html").read_text()
    always = make_run(tmp_path, recipe=recipe(ENTROPY, KD), host=host, name="always").execute()["stages"][-1]["flops"]
    assert 4 * flops["teacher"] == always["teacher"]


def test_no_schedule_is_the_constant_one_and_no_part_of_a_key():
    plain, written = (compiled(recipe(ENTROPY, term)) for term in (KD, {**KD, "schedule": "constant"}))
    cosine = compiled(recipe(ENTROPY, {**KD, "schedule": "cosine"}))
    assert plain.objective == written.objective != cosine.objective
    assert "shape" not in repr(encode(plain.objective, str))


def test_stages_on_labels_alone_have_no_schedule():
    plain = compiled(recipe(ENTROPY, KD))
    shaped = compiled(recipe({**ENTROPY, "schedule": "cosine"}, {**KD, "schedule": "cosine"}))
    assert shaped.labels == plain.labels
    stages = [view.label_only("teacher", view.teacher) for view in (plain, shaped)]
    assert stages[0].identity == stages[1].identity, "teacher and control are shared"


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ("cosin", r"objective\[1\].schedule.name: unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({"name": "step"}, r"objective\[1\].schedule.milestones: missing"),
        ({"name": "cosine", "floor": 2.0}, r"objective\[1\].schedule.floor: 2.0 is above 1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(schedule, text):
    with pytest.raises(RecipeError, match=text):
        compiled(recipe(ENTROPY, {**KD, "schedule": schedule}))
