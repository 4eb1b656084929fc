"""What an objective promises: terms combine freely, with weights, warm-ups and schedules of their own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import RECIPE, file_hash, make_run
from torch import nn

from kdcore.codec import encode
from kdcore.data import Batch
from kdcore.errors import PlanError, RecipeError
from kdcore.losses import terms as losses
from kdcore.options import Options
from kdcore.outputs import Outputs
from kdcore.plan import Term
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load
from kdcore.training import building
from kdcore.training.member import LiveTerm, Tapped, tap_names
from kdcore.training.objective import source_of, weighted_loss

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


# ---------------------------------------------------------------- one call, and no more work than asked for

STUDENT, TEACHER, OTHER = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCH = Batch(torch.zeros(6, 1, 2, 2), torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(6), 0)
OTHERS = {"teacher": Outputs(TEACHER), "other": Outputs(OTHER)}


def live(module, weight, number, source="teacher"):
    source = None if isinstance(module, losses.CrossEntropy) else source
    term = Term(f"core/{type(module).__name__.lower()}", source, weight, name=f"t{number}")
    return LiveTerm(term, module, Options, lambda epoch, warm: 1.0, source, weight)


def called(objective):
    """The objective's value, its gradient, and what was recorded."""
    leaf, said = STUDENT.clone().requires_grad_(), {}
    total = weighted_loss(objective, Outputs(leaf), OTHERS, BATCH, lambda name, value: said.update({name: value}))
    total.backward()
    return total.detach(), leaf.grad, {name: value.detach() for name, value in said.items()}


modules = st.one_of(
    st.builds(losses.CrossEntropy, st.sampled_from([0.0, 0.1])),
    st.builds(losses.KD, st.sampled_from([1.0, 4.0]), st.sampled_from(["none", "class", "instance"])),
    st.builds(losses.DKD, st.sampled_from([1.0, 4.0]), st.sampled_from(["none", "class", "instance"])),
)
summands = st.tuples(modules, st.floats(0.01, 100), st.sampled_from(["teacher", "other"]))


@given(st.lists(summands, min_size=1, max_size=5))
def test_an_objective_is_the_sum_of_its_terms_whatever_they_are(found):
    """Two entropies, two teachers, one loss twice: fused or not."""
    objective = [live(module, weight, number, source) for number, (module, weight, source) in enumerate(found)]
    total, gradient, said = called(objective)
    alone = [called([term]) for term in objective]
    torch.testing.assert_close(total, sum(value for value, _, _ in alone), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, sum(part for _, part, _ in alone), rtol=1e-8, atol=1e-11)
    assert set(said) == {term.label for term in objective}
    for term, (_, _, single) in zip(objective, alone, strict=True):
        torch.testing.assert_close(said[term.label], single[term.label], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "loss"), [("kd_loss", losses.KD), ("dkd_loss", losses.DKD)])
def test_cross_entropy_and_one_distillation_are_one_call(monkeypatch, name, loss):
    calls, function = [], getattr(losses, name)
    monkeypatch.setattr(losses, name, lambda *args, **more: calls.append(more) or function(*args, **more))
    monkeypatch.delattr(losses, "cross_entropy")
    called([live(losses.CrossEntropy(), 0.5, 0), live(loss(), 2.0, 1)])
    (settings,) = calls
    assert (settings["kd_weight"], settings["ce_weight"]) == (2.0, 0.5)


def test_terms_on_logits_register_no_hooks(tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError("hooks for terms without features")

    monkeypatch.setattr(building, "Tapped", fail)
    make_run(tmp_path, recipe=recipe(ENTROPY, KD, {"loss": "dkd"}, epochs=1)).execute()


def test_taps_are_not_copied():
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 5))
    model.taps = {"hidden": "1"}
    seen = []
    tapped = Tapped(model, frozenset({"hidden"}))
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = Outputs(model(torch.randn(2, 3)), dict(tapped.taps))
    assert outputs.taps["hidden"] is seen[0]
    cut = source_of(live(losses.KD(), 1.0, 0), {"teacher": outputs})
    assert cut.taps["hidden"].data_ptr() == seen[0].data_ptr()
    assert cut.logits.data_ptr() == outputs.logits.data_ptr()
    assert not cut.taps["hidden"].requires_grad


def test_two_of_a_loss_have_weights_and_schedules_of_their_own(tmp_path):
    soft = {**KD, "temperature": 8.0, "name": "soft", "weight": 1.0, "schedule": "cosine"}
    twice = [ENTROPY, {**ENTROPY, "name": "smooth", "label_smoothing": 0.2, "weight": 0.5}]
    rows = student(make_run(tmp_path, recipe=recipe(*twice, {**KD, "warmup_epochs": 4}, soft)).execute())["curve"]
    for epoch, row in enumerate(rows):
        cosine = 0.5 * (1 + math.cos(math.pi * epoch / 4))
        parts = [row["train.cross_entropy"], 0.5 * row["train.smooth"]]
        parts += [4 * (epoch + 1) / 4 * row["train.kd"], cosine * row["train.soft"]]
        assert row["train.loss"] == pytest.approx(sum(parts), rel=1e-5)


def test_two_of_a_loss_without_names_are_told_to_take_some():
    with pytest.raises(RecipeError, match=r"""objective\[2\].name: the name 'kd' is objective\[1\]'s. Give this one"""):
        compiled(recipe(ENTROPY, KD, KD))


@pytest.mark.parametrize(("taps", "fix"), [({"a": "0", "b": "1"}, "It has a, b."), ({}, "It has none: take a model")])
def test_a_tap_that_is_not_there_is_told_what_is(taps, fix):
    module = nn.Identity()
    module.taps = taps
    with pytest.raises(PlanError, match=f"no tap 'stage\\?'. {fix}"):
        tap_names(module, ["stage?"])
