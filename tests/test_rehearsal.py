"""What only models can show is found before the first stage is trained, and by `kdcore plan`; it changes nothing."""

from __future__ import annotations

import random
import tomllib

import numpy as np
import pytest
import torch
from small import RECIPE, make_run, weights

from kdcore.errors import KdError, PlanError
from kdcore.plugins import load_plugins

SETS = ["teacher={ model = 'cnn', size = 2 }", "student={ model = 'cnn', size = 1 }", "train.epochs=1"]

OWN = """
import kdcore
from torch import nn

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("wide", Wide)

class Wide(nn.Module):
    needs = frozenset({"taps"})

    @staticmethod
    def taps(options):
        return ("stage1",), ("stage2",)

    @classmethod
    def build(cls, shapes, options):
        return cls()

    def forward(self, student, teacher, batch):
        return (student.taps["stage1"] - teacher.taps["stage2"]).square().mean()
"""


def refused(tmp_path, *tables, sets=(), host=None, **more):
    """What a run raises, which must be before anything is trained."""
    recipe = {**RECIPE, "objective": [{"loss": "cross_entropy"}, *tables], **more}
    run = make_run(tmp_path, recipe=recipe, sets=[*SETS, *sets], host=host)
    with pytest.raises(Exception) as found:  # noqa: PT011 - each test says of what class
        run.execute()
    assert not list(run.journal.of("start"))
    return found.value


def test_a_missing_tap_names_member_place_and_what_to_write(tmp_path):
    error = refused(tmp_path, {"loss": "reviewkd"})
    assert isinstance(error, PlanError)
    assert str(error) == (
        "objective[1] (reviewkd): teacher cnn-2 has no tap 'stage*_pre'. It has stage1, stage2, pooled: "
        'write teacher = ["stage?", "pooled"].'
    )


@pytest.mark.parametrize(
    ("table", "sets", "says"),
    [
        ({"loss": "fitnet", "student": ["stage1"], "adapter": "linear"}, [], "objective[1] (fitnet), adapter: adapter"),
        ({"loss": "kd", "normalize": "class"}, ["data.batch_size=1"], "data.batch_size: a batch of 1 is too small"),
        ({"loss": "kd"}, ["student=squeezenet1_1"], "student, model 'squeezenet1_1': it cannot take 1x8x8 images"),
    ],
)
def test_what_models_cannot_do_is_refused_before_the_teacher_is_trained(tmp_path, table, sets, says):
    assert says in str(refused(tmp_path, table, sets=sets))


def test_a_loss_that_fails_on_its_first_batch_is_told_with_the_shapes_that_it_saw(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    error = refused(tmp_path, {"loss": "wide"}, host=load_plugins(files=[tmp_path / "own.py"]))
    assert isinstance(error, RuntimeError)
    assert not isinstance(error, KdError)
    assert any("was given student: logits [8, 10], stage1 [8," in note for note in error.__notes__)
    assert any("teacher: logits [8, 10], stage2 [8," in note for note in error.__notes__)


def test_every_objective_of_a_strategy_is_tried_at_its_place(tmp_path):
    variants = tomllib.loads("""
        name = "variants"
        variant = [
            { name = "kd", objective = [{ loss = "kd" }], grid = { "kd.weight" = [1.0, 2.0] } },
            { name = "ofd", objective = [{ loss = "cross_entropy" }, { loss = "ofd" }] },
        ]""")
    error = refused(tmp_path, strategy=variants)
    assert str(error).startswith("strategy.variant[1].objective[1] (ofd): student cnn-1 has no tap 'stage*_pre'")


def test_every_candidate_is_tried_as_a_student(tmp_path):
    fitnet = {"loss": "fitnet", "student": ["stage1"], "teacher": ["stage1"], "adapter": "conv1x1"}
    search = {"name": "search", "candidates": [{"model": "mlp", "size": 3}]}
    error = refused(tmp_path, fitnet, strategy=search)
    assert str(error).startswith("strategy.candidates[0], objective[1] (fitnet), adapter: adapter")


def test_a_plan_is_refused_as_the_run_would_be(tmp_path, cli):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text("""
        data = { name = "digits" }
        teacher = { model = "cnn", size = 2 }
        student = { model = "cnn", size = 1 }
        objective = [{ loss = "ofd" }]""")
    done = cli("plan", str(recipe))
    assert done.code == 8
    assert "objective[0] (ofd): student cnn-1 has no tap" in done.err


def test_a_rehearsal_changes_neither_weights_nor_random_state(tmp_path, monkeypatch):
    recipe = {**RECIPE, "objective": [{"loss": "cross_entropy"}, {"loss": "crd", "student": "pooled"}]}
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    make_run(tmp_path / "with", recipe=recipe, sets=SETS).execute()
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    monkeypatch.setattr("kdcore.training.rehearsal.rehearse", lambda *arguments: None)
    make_run(tmp_path / "without", recipe=recipe, sets=SETS).execute()
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_nothing_is_rehearsed_where_nothing_is_trained(tmp_path, monkeypatch):
    make_run(tmp_path, sets=["train.epochs=1"]).execute()
    monkeypatch.setattr("kdcore.training.rehearsal.rehearse", lambda *arguments: pytest.fail("it was rehearsed"))
    make_run(tmp_path, sets=["train.epochs=1"]).execute()
