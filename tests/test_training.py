"""What training promises: numbers depend on seed and role alone, and what is not finite stops the stage."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import PROOFS, RECIPE, file_hash, make_run, weights

import kdcore
from kdcore.errors import DataError, NumericError, PlanError, PluginError, RecipeError
from kdcore.plan import Schedule, Spec, Term
from kdcore.plugins import load_plugins
from kdcore.training.meters import Meters
from kdcore.training.schedules import compile_schedule


def curve(result, member="student", stage=-1):
    return result["stages"][stage]["members"][member]["curve"]


NOISY = """
import kdcore
from torch import nn

@kdcore.hookimpl
def kdcore_register(registry):
    registry.model("noisy", lambda options, data: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)))
"""

# ---------------------------------------------------------------- randomness


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(tmp_path):
    hashes = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_run(tmp_path / name, sets=[f"seed={seed}"]).execute()
        hashes[name] = file_hash(tmp_path / name / "run" / "student.safetensors")
    assert hashes["a"] == hashes["b"] != hashes["c"]


def test_training_leaves_the_callers_random_state_and_threads_alone(tmp_path):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    make_run(tmp_path).execute()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_dropout_depends_on_seed_role_and_step_not_on_company(tmp_path):
    file = tmp_path / "noisy.py"
    file.write_text(NOISY)
    for mode in ("shared", "side-by-side"):
        controller = [{"name": "dskd", "mode": mode, "patience": 99}]
        recipe = {**RECIPE, "student": {"model": "noisy"}, "controller": controller}
        make_run(tmp_path / mode, recipe=recipe, host=load_plugins(files=[file])).execute()
    assert weights(tmp_path / "shared", "control") == weights(tmp_path / "side-by-side", "control")


# ---------------------------------------------------------------- what a recipe can ask for


@pytest.mark.parametrize(
    "sets",
    [
        ["train.optimizer.name=adamw", "train.lr=0.003"],
        ["train.clip=0.1"],
        ["precision=bfloat16"],
        ["channels_last=true"],
        ["train.warmup_epochs=2"],
        ["train.schedule={name='step', milestones=[1]}"],
        ["objective.0.label_smoothing=0.1"],
        ["objective.1.normalize=class"],
        ["objective.1.loss=dkd"],
        ["data.flip=true", "data.shift=1"],
    ],
)
def test_every_setting_of_training_changes_the_weights(tmp_path, sets, plain_student):
    make_run(tmp_path, sets=sets, recipe=CNN).execute()
    assert file_hash(tmp_path / "run" / "student.safetensors") != plain_student


CNN = {**RECIPE, "student": {"model": "cnn", "size": 2, "width": 0.25}}


@pytest.fixture(scope="module")
def plain_student(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    make_run(root, recipe=CNN).execute()
    return file_hash(root / "run" / "student.safetensors")


def test_warm_up_and_schedules_give_the_rates_they_promise():
    catalog = load_plugins().catalog
    cosine = compile_schedule(Schedule(1.0, 2, Spec("cosine")), catalog, 10)
    assert [cosine(0, 1), cosine(0, 2), cosine(5, 6), cosine(10, 11)] == pytest.approx([0.5, 1, 0.5, 0])
    step = compile_schedule(Schedule(1.0, 0, Spec("step", {"milestones": [3, 6], "gamma": 0.1})), catalog, 10)
    assert [step(2.9, 1), step(3, 1), step(6, 1)] == pytest.approx([1, 0.1, 0.01])


def test_a_terms_warm_up_counts_epochs_from_one(tmp_path):
    rows = curve(make_run(tmp_path, sets=["objective.1.warmup_epochs=4", "train.epochs=5"]).execute())
    weights = [(row["train.loss"] - row["train.cross_entropy"]) / row["train.kd"] for row in rows]
    assert weights == pytest.approx([0.25, 0.5, 0.75, 1, 1], rel=1e-4)


def test_fused_cross_entropy_equals_two_calls(tmp_path):
    from kdcore.losses import terms

    fused = curve(make_run(tmp_path / "a").execute())
    method = terms.Distillation.with_cross_entropy
    try:
        del terms.Distillation.with_cross_entropy
        single = curve(make_run(tmp_path / "b").execute())
    finally:
        terms.Distillation.with_cross_entropy = method
    for row, other in zip(fused, single, strict=True):
        assert row["train.loss"] == pytest.approx(other["train.loss"], rel=1e-5)
        assert row["train.kd"] == pytest.approx(other["train.kd"], rel=1e-4)


AVERAGED = """
import dataclasses
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.strategy("averaged", Averaged)

class Averaged:
    class Options(kdcore.Options):
        ema: float | None = None

    def plan(self, run, options):
        stage = run.label_only("teacher", run.student)
        member = dataclasses.replace(stage.members["teacher"], ema=options.ema)
        stage = dataclasses.replace(stage, length=run.epochs, members={"teacher": member})
        yield stage
        return kdcore.Outcome(stage["teacher"])
"""


def test_an_average_is_what_is_evaluated_and_delivered(tmp_path):
    """One step an epoch: the average after two is decay x the first weights + (1 - decay) x the second."""
    file = tmp_path / "averaged.py"
    file.write_text(AVERAGED)
    steps = ["data.batch_size=100000", "train.schedule=constant"]

    def delivered(name, *sets):
        recipe = {**RECIPE, "strategy": {"name": "averaged"}}
        make_run(tmp_path, recipe=recipe, sets=[*steps, *sets], host=load_plugins(files=[file]), name=name).execute()
        return load_file(tmp_path / name / "student.safetensors")

    first, second = delivered("one", "train.epochs=1"), delivered("two", "train.epochs=2")
    average = delivered("average", "train.epochs=2", "strategy.ema=0.75")
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name])
        assert not torch.equal(tensor, second[name])


# ---------------------------------------------------------------- bad numbers, bad input


def test_a_loss_that_is_not_finite_names_stage_step_member_and_term(tmp_path):
    with pytest.raises(NumericError) as error:
        make_run(tmp_path, sets=["train.lr=1e30", "train.teacher={lr=0.05}", "student.size=2"]).execute()
    text = str(error.value)
    assert "stage 'mlp-2 -> mlp-2'" in text
    assert "step" in text
    assert "member 'student'" in text
    assert error.value.exit_code == 6


def test_a_meter_names_the_first_bad_step():
    def stop(member, error):
        raise error

    meters = Meters()
    for step, value in enumerate([1.0, float("nan"), float("inf")]):
        meters.record("student.kd", step, torch.tensor(value))
    with pytest.raises(NumericError, match="step 1, member 'student', term 'kd'"):
        meters.flush("s", stop)


def test_weights_that_are_not_finite_never_reach_a_file(tmp_path):
    with pytest.raises(NumericError):
        make_run(tmp_path, sets=["train.lr=1e30", "execute.checkpoint_seconds=0"]).execute()
    for path in tmp_path.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values() if tensor.is_floating_point())


def test_a_batch_of_one_with_class_normalisation_is_refused_before_the_first_step(tmp_path):
    sets = ["data.batch_size=1", "objective.1.normalize=class"]
    run = make_run(tmp_path, sets=sets)
    with pytest.raises(DataError, match=r"data.batch_size: a batch of 1 is too small for loss 'core/kd'"):
        run.execute()
    assert not list(run.journal.of("start"))


def test_a_ragged_batch_of_one_with_class_normalisation_is_refused(tmp_path):
    run = make_run(tmp_path)
    size = len(run.context.load(run.view.data).train) - 1
    bad = make_run(tmp_path, sets=["objective.1.normalize=class", "data.drop_last=false", f"data.batch_size={size}"])
    with pytest.raises(DataError, match="a batch of 1"):
        bad.execute()


def without_card(source, folder):
    """A copy of a weights file as others write it: nothing in it says its model or images."""
    save_file(load_file(source), folder / "bare.safetensors")
    return str(folder / "bare.safetensors")


def test_a_teacher_with_other_classes_is_refused_by_name(tmp_path):
    synthetic = {"name": "synthetic", "classes": 3, "samples": 60, "test_samples": 30, "size": 8, "channels": 1}
    make_run(tmp_path, recipe={**RECIPE, "data": {**synthetic, "batch_size": 16}}).execute()
    source = next(tmp_path.glob("store/results/*/teacher.safetensors"))
    recipe = {**RECIPE, "teacher": {**RECIPE["teacher"], "weights": without_card(source, tmp_path)}}
    with pytest.raises(RecipeError, match="must have the data's number of classes"):
        make_run(tmp_path, recipe=recipe, name="other").execute()


def test_weights_of_another_architecture_are_refused(tmp_path):
    make_run(tmp_path).execute()
    source = next(tmp_path.glob("store/results/*/teacher.safetensors"))
    recipe = {**RECIPE, "teacher": {"model": "cnn", "size": 1, "weights": without_card(source, tmp_path)}}
    with pytest.raises(RecipeError, match=r"lacks|too"):
        make_run(tmp_path, recipe=recipe, name="other").execute()


def test_an_unknown_knob_gets_a_did_you_mean(tmp_path):
    class Turner:
        Options = kdcore.Options
        needs = frozenset()

        def __init__(self, options):
            pass

        def decide(self, view):
            return [kdcore.Set("student.kd.wieght", 0)]

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    host = load_plugins()
    entry = host.catalog.find("controller", "earlystop")
    entry.__dict__["target"] = Turner
    entry.__dict__["options"] = kdcore.Options
    with pytest.raises(PlanError, match=r"student.kd.wieght: no such knob. Did you mean 'student.kd.weight'"):
        make_run(tmp_path, recipe={**RECIPE, "controller": [{"name": "earlystop"}]}, host=host).execute()


def test_terms_that_share_a_name_are_refused(tmp_path):
    recipe = {**RECIPE, "objective": [{"loss": "cross_entropy"}, {"loss": "kd"}, {"loss": "kd"}]}
    with pytest.raises(RecipeError, match=r"objective\[2\].name: the name 'kd' is objective\[1\]'s"):
        make_run(tmp_path, recipe=recipe)
    named = {**RECIPE, "objective": [*recipe["objective"][:2], {"loss": "kd", "name": "hot", "temperature": 8}]}
    result = make_run(tmp_path, recipe=named).execute()
    assert {"train.kd", "train.hot", "share.hot", "cosine.kd.hot"} <= set(curve(result)[-1])


def test_a_term_is_called_by_its_short_name():
    assert Term("core/kd").label == "kd"
    assert Term("core/kd", name="hot").label == "hot"


def test_a_source_without_epochs_wants_a_tick(tmp_path):
    recipe = {**RECIPE, "data": {**RECIPE["data"], "source": "stream"}}
    with pytest.raises(PlanError, match=r"'proofs/stream' has no epochs\. Give the stage a tick"):
        make_run(tmp_path, recipe=recipe, host=load_plugins(files=[PROOFS])).execute()


def test_a_plugins_cross_entropy_is_not_mistaken_for_the_cores(tmp_path, plugin_file):
    file = plugin_file("entropy_plugin", PLUGIN_ENTROPY)
    recipe = {**RECIPE, "objective": [{"loss": "entropy_plugin/cross_entropy"}, {"loss": "kd"}]}
    rows = curve(make_run(tmp_path, recipe=recipe, host=load_plugins(files=[file])).execute())
    assert {row["train.cross_entropy"] for row in rows} == {42.0}


PLUGIN_ENTROPY = """
from typing import ClassVar

import kdcore
from torch import nn

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("cross_entropy", Entropy)

class Entropy(nn.Module):
    needs = frozenset({"logits"})

    class Options(kdcore.Options):
        on_labels: ClassVar[bool] = True

    @classmethod
    def build(cls, shapes, options):
        return cls()

    def forward(self, student, teacher, batch):
        return student.logits.sum() * 0 + 42
"""


def test_label_terms_keep_their_proportion_where_labels_are_alone(tmp_path):
    terms = [{"loss": "cross_entropy", "weight": 0.5}, {"loss": "cross_entropy", "name": "soft", "weight": 0.01}]
    run = make_run(tmp_path, recipe={**RECIPE, "objective": [*terms, {"loss": "kd"}]})
    assert [term.weight.value for term in run.view.labels] == [1.0, 0.02]


def test_a_student_that_starts_from_weights_has_a_control_that_does_too(tmp_path):
    make_run(tmp_path, sets=["train.epochs=1"]).execute()
    source = tmp_path / "run" / "student.safetensors"
    student = {**RECIPE["student"], "weights": str(source)}
    recipe = {**RECIPE, "student": student, "controller": [{"name": "dskd", "patience": 1}]}
    run = make_run(tmp_path, recipe=recipe, name="warm")
    run.execute()
    control = next(stage for stage in run.stages.values() if "control" in stage.members)
    assert control.length == 2
    assert control.members["control"].model.weights == str(source)


CONTROLLER = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.controller("odd", Odd)

class Odd:
    Options = kdcore.Options
    needs = frozenset()

    def __init__(self, options):
        pass

    def decide(self, view):
        return ANSWER

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
"""


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        ('[kdcore.Set("student.kd.temperature", -3.0)]', PlanError, "student.kd.temperature: -3.0 is not above 0"),
        ('[kdcore.Set("student.kd.temperature", "x")]', PlanError, "is not a number"),
        ('["stop"]', PluginError, "decide\\(\\) gave 'stop'"),
        ("7", PluginError, "decide\\(\\) gave 7"),
    ],
)
def test_a_bad_decision_names_what_is_wrong(tmp_path, answer, error, says):
    file = tmp_path / f"odd{abs(hash(answer))}.py"
    file.write_text(CONTROLLER.replace("ANSWER", answer))
    recipe = {**RECIPE, "controller": [{"name": "odd"}]}
    with pytest.raises(error, match=says):
        make_run(tmp_path, recipe=recipe, host=load_plugins(files=[file])).execute()


def test_a_controller_without_its_parts_is_refused_before_training(tmp_path):
    file = tmp_path / "partless.py"
    text = CONTROLLER.replace("needs = frozenset()", "").replace("state_dict", "state")
    file.write_text(text.replace("ANSWER", "[]"))
    recipe = {**RECIPE, "controller": [{"name": "odd"}]}
    with pytest.raises(PluginError, match="has no 'needs' and no 'state_dict' and no 'load_state_dict'"):
        make_run(tmp_path, recipe=recipe, host=load_plugins(files=[file])).execute()
    assert not list(tmp_path.glob("store/results/*"))
