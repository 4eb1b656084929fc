"""Mixed samples and soft targets: the mixing itself, and soft targets through losses, objectives, memory and runs."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats
from small import RECIPE, make_run, weights

import kdcore
from kdcore.data import DataInfo, TrainData
from kdcore.data.mix import beta_quantiles, interpolate
from kdcore.data.source import EpochSource
from kdcore.errors import RecipeError
from kdcore.executor import DataCache
from kdcore.keys import names
from kdcore.losses import dkd_loss, kd_loss
from kdcore.losses.terms import DKD, KD, CrossEntropy
from kdcore.measure import Measure
from kdcore.plan import Spec
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load
from kdcore.seeds import derive
from kdcore.transforms import build_transform

CLASSES = 5
INFO = DataInfo((2, 6, 7), CLASSES)
CATALOG = load_plugins().catalog
MODES = ("none", "class", "instance")
quick = settings(max_examples=25)
kinds = st.sampled_from(["mixup", "cutmix"])
alphas = st.sampled_from([0.05, 0.2, 1.0, 3.0, 8.0])


@cache
def made(name, **options):
    return build_transform(Spec(name, options), CATALOG, INFO)


def batch_of(size, seed=0):
    """Images whose pixels say which sample and which place they are of."""
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:size]
    inputs = index[:, None, None, None] + torch.arange(6 * 7).view(6, 7) / 64 + torch.zeros(2, 1, 1)
    return kdcore.Batch(inputs, index % CLASSES, index, 3)


def mixed(transform, batch, seed=0):
    return transform(batch, kdcore.Random(seed, batch.index, 3))


def shares(before, after):
    """What is left of each sample's own label, where the other one is of another class."""
    other = before.target != before.target.roll(-1)
    return after.target[torch.arange(len(other)), before.target], other


# ---------------------------------------------------------------- mixing


@quick
@given(kinds, alphas, st.floats(0, 1), st.integers(1, 40), st.integers(0, 2**32))
def test_labels_are_shares_of_two_classes_that_sum_to_1(name, alpha, p, size, seed):
    before = batch_of(size)
    after = mixed(made(name, alpha=alpha, p=p), before, seed)
    assert after.target.dtype == torch.float32
    assert after.target.shape == (size, CLASSES)
    assert (after.target >= 0).all()
    torch.testing.assert_close(after.target.sum(1), torch.ones(size))
    others = torch.ones(size, CLASSES).scatter(1, before.target[:, None], 0)
    others = others.scatter(1, before.target.roll(-1)[:, None], 0)
    assert not (after.target * others).any()
    assert torch.equal(after.index, before.index)


@quick
@given(alphas, st.integers(2, 40), st.integers(0, 2**32))
def test_mixup_weighs_images_as_labels(alpha, size, seed):
    before = batch_of(size)
    after = mixed(made("mixup", alpha=alpha), before, seed)
    share, other = shares(before, after)
    share = share[:, None, None, None]
    expected = share * before.inputs + (1 - share) * before.inputs.roll(-1, 0)
    torch.testing.assert_close(after.inputs[other], expected[other])


@quick
@given(alphas, st.integers(2, 40), st.integers(0, 2**32))
def test_cutmix_weighs_labels_by_pixels_exactly(alpha, size, seed):
    before = batch_of(size)
    after = mixed(made("cutmix", alpha=alpha), before, seed)
    own = (after.inputs == before.inputs).all(1)
    assert torch.equal(torch.where(own[:, None], before.inputs, before.inputs.roll(-1, 0)), after.inputs)
    share, other = shares(before, after)
    assert torch.equal(share[other], (own.sum((1, 2)) / own[0].numel())[other])
    for kept in own:  # what is foreign is a box
        rows, columns = (~kept).any(1), (~kept).any(0)
        assert torch.equal(~kept, rows[:, None] & columns)
        assert all(span.diff().ne(0).sum() <= 2 for span in (rows.int(), columns.int()))


@quick
@given(kinds, st.integers(2, 40), st.permutations(range(40)), st.integers(0, 2**32))
def test_a_samples_share_is_the_same_in_any_batch(name, size, order, seed):
    transform, whole = made(name, alpha=1.0), kdcore.Random(seed, torch.arange(40), 3)
    part = torch.tensor(order[:size])
    assert torch.equal(transform.shares(kdcore.Random(seed, part, 3)), transform.shares(whole)[part])


@quick
@given(kinds, st.integers(1, 20), st.integers(0, 2**32))
def test_mixing_can_be_replayed(name, size, seed):
    before = batch_of(size)
    first, second = (mixed(made(name), before, seed) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.target, second.target)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_of_a_beta_distribution(alpha):
    random = kdcore.Random(0, torch.arange(20_000), 0)
    found = made("mixup", alpha=alpha).shares(random)
    assert 0 <= found.min() <= found.max() <= 1
    places = np.linspace(0.01, 0.99, 99)  # float32 rounds what is closer to 1 than 3e-8
    below = np.searchsorted(np.sort(found.double().numpy()), places) / len(found)
    assert np.abs(below - stats.beta(alpha, alpha).cdf(places)).max() < 1.63 / len(found) ** 0.5  # as of Kolmogorov, 1%
    u = torch.linspace(0.001, 0.999, 997)
    exact = stats.beta(alpha, alpha).ppf(u.double().numpy())
    assert np.abs(interpolate(beta_quantiles(alpha), u).double().numpy() - exact).max() < 1e-4


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_p_is_the_probability_that_a_sample_is_mixed(name):
    random = kdcore.Random(0, torch.arange(2000), 0)
    assert (made(name, alpha=4.0, p=0.25).shares(random) == 1).float().mean() == pytest.approx(0.75, abs=0.04)
    before = batch_of(12)
    after = mixed(made(name, p=0.0), before)
    assert torch.equal(after.inputs, before.inputs)
    assert torch.equal(after.target.argmax(1), before.target)


def test_soft_labels_are_mixed_again_and_no_labels_stay_none():
    before = batch_of(12)
    after = mixed(made("cutmix"), mixed(made("mixup", alpha=1.0), before))
    torch.testing.assert_close(after.target.sum(1), torch.ones(12))
    assert (after.target > 0).sum(1).max() == 3
    unlabelled = dataclasses.replace(before, target=None)
    assert mixed(made("mixup"), unlabelled).target is None
    assert mixed(made("views"), unlabelled).target is None


# ---------------------------------------------------------------- two views


class Note:
    """Adds what it is given, and keeps its random numbers."""

    def __init__(self, value):
        self.value, self.seen = value, []

    def __call__(self, batch, random):
        self.seen.append(random.uniform("note"))
        return dataclasses.replace(batch, inputs=batch.inputs + self.value)


def views(*arguments):
    from kdcore.data.mix import Views

    return Views(*arguments, CLASSES)


def test_views_are_two_copies_that_are_augmented_apart():
    weak, strong, before = Note(0.25), Note(0.5), batch_of(6)
    after = mixed(views((weak,), (strong, strong)), before)
    assert torch.equal(after.inputs, torch.cat([before.inputs + 0.25, before.inputs + 1]))
    assert torch.equal(after.target, before.target.repeat(2))
    assert torch.equal(after.index, before.index.repeat(2))
    assert torch.equal(weak.seen[0], kdcore.Random(0, before.index, 3).uniform("note"))
    assert not torch.equal(weak.seen[0], strong.seen[0])


def test_views_may_be_mixed_apart_and_together():
    before = batch_of(6)
    strongly = mixed(views((), (made("mixup"),)), before)
    assert torch.equal(strongly.target[:6].argmax(1), before.target)
    assert torch.equal(
        strongly.target[6:], made("mixup")(before, kdcore.Random(derive(0, "strong"), before.index, 3)).target
    )
    both = mixed(made("cutmix"), mixed(views((), ()), before))
    assert torch.equal(both.inputs[:6], both.inputs[6:])
    assert torch.equal(both.target[:6], both.target[6:])


def test_a_transform_after_views_treats_both_alike():
    split = kdcore.Split(torch.zeros(8, 2, 6, 7), torch.arange(8) % CLASSES)
    note, data = Note(0.0), TrainData(split, INFO, (0.0, 0.0), (1.0, 1.0), "0" * 64)
    context = kdcore.SourceContext(data, 0, 4, False, (views((), ()), note), torch.device("cpu"))
    batch = EpochSource(kdcore.Options(), context).batch(0)
    assert torch.equal(batch.index[:4], batch.index[4:])
    assert torch.equal(note.seen[0][:4], note.seen[0][4:])


def checked(*transforms):
    return view_of({"name": "digits", "transforms": list(transforms)}).data.transforms


def view_of(data):
    return compile_recipe(load({**RECIPE, "data": data}), CATALOG)[0]


def test_a_recipe_names_the_transforms_of_a_view_as_any_others():
    (spec,) = checked({"name": "views", "weak": ["flip"], "strong": [{"name": "shift", "pixels": 2}, "mixup"]})
    assert json.loads(json.dumps(spec.options)) == {
        "weak": [{"name": "core/flip"}],
        "strong": [{"name": "core/shift", "pixels": 2}, {"name": "core/mixup", "alpha": 0.2, "p": 1.0}],
    }
    built = build_transform(spec, CATALOG, INFO)
    assert [type(part).__name__ for part in (*built.weak, *built.strong)] == ["Flip", "Shift", "MixUp"]


@pytest.mark.parametrize(
    ("strong", "text"),
    [
        ([{"name": "shift"}], "data.transforms[0].strong[0].pixels: missing"),
        (["flop"], "data.transforms[0].strong[0].name: unknown transform 'flop'. Did you mean 'flip'?"),
        (["flip", {"pixels": 2}], "data.transforms[0].strong[1].name: missing"),
        ([3], "data.transforms[0].strong[0]: 3 is not a table"),
        ("flip", "data.transforms[0].strong: 'flip' is not a list"),
    ],
)
def test_a_mistake_inside_a_view_is_found_where_it_stands(strong, text):
    with pytest.raises(RecipeError) as error:
        checked({"name": "views", "strong": strong})
    assert str(error.value).startswith(text)


def test_the_code_of_a_views_transforms_is_part_of_the_key():
    run = view_of(
        {"name": "digits", "transforms": [{"name": "views", "strong": [{"name": "views", "weak": ["flip"]}]}]}
    )
    found = names(run.label_only("student", run.student), CATALOG)
    assert [name for kind, name in found if kind == "transform"] == ["core/views", "core/views", "core/flip"]


# ---------------------------------------------------------------- soft targets in losses


def logits(rows=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, rows, CLASSES, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def soft(rows=6):
    target = mixed(made("mixup", alpha=1.0), batch_of(rows)).target
    assert (target.argmax(1) != batch_of(rows).target).any(), "where the other sample's share is larger"
    return target


def entropy_of(student, target):
    return -(target * student.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [kd_loss, dkd_loss])
def test_cross_entropy_uses_the_row_and_dkd_its_larger_part(loss, mode, backend):
    (student, teacher), target = logits(), soft().double()
    how = {"normalize": mode, "backend": backend}
    total = loss(student, teacher, target, kd_weight=2.0, ce_weight=0.5, **how)
    expected = 2 * loss(student, teacher, target.argmax(1), **how) + 0.5 * entropy_of(student, target)
    torch.testing.assert_close(total, expected)
    found, wanted = (torch.autograd.grad(value, student)[0] for value in (total, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("term", [KD, DKD])
def test_terms_of_a_recipe_take_soft_targets_fused_with_cross_entropy(term, mode, dtype):
    (student, teacher), target = logits(dtype=dtype), soft()
    batch = dataclasses.replace(batch_of(6), target=target)
    own, source = kdcore.Outputs(student), kdcore.Outputs(teacher)
    module = term(normalize=mode)
    total, parts = module.with_cross_entropy(own, source, batch, weight=2.0, ce_weight=0.5, label_smoothing=0.1)
    apart = 2 * module(own, source, batch) + 0.5 * CrossEntropy(0.1)(own, None, batch)
    torch.testing.assert_close(total, apart, rtol=1e-4, atol=1e-5)
    assert parts.keys() == {"kd", "ce"}
    grad = torch.autograd.grad(total, student)[0]
    assert grad.dtype == dtype
    assert grad.isfinite().all()


# ---------------------------------------------------------------- soft targets in runs

MIXED = {"name": "digits", "batch_size": 128, "transforms": ["mixup", {"name": "cutmix", "p": 0.5}]}
FIRST = {**RECIPE, "data": MIXED, "train": {"epochs": 1}}


def objective(loss, **options):
    return [{"loss": "cross_entropy", "label_smoothing": 0.1}, {"loss": loss, "weight": 2.0, **options}]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_a_run_on_mixed_samples_ends_with_accuracies_and_gradient_shares(tmp_path, loss, mode):
    recipe = {**FIRST, "objective": objective(loss, normalize=mode)}
    stage = make_run(tmp_path, recipe=recipe).execute()["stages"][-1]
    (row,) = stage["members"]["student"]["curve"]
    assert 0.1 < row["accuracy"] <= 1
    assert {f"share.{loss}", "share.cross_entropy"} <= set(row)
    assert row[f"train.{loss}"] > 0


def test_the_same_recipe_gives_the_same_weights_and_another_alpha_others(tmp_path):
    other = {**FIRST, "data": {**MIXED, "transforms": [{"name": "mixup", "alpha": 2.0}]}}
    for root, recipe in ((tmp_path / "a", FIRST), (tmp_path / "b", FIRST), (tmp_path / "c", other)):
        make_run(root, recipe=recipe).execute()
    first, second, third = (weights(tmp_path / name) for name in "abc")
    assert first == second != third


@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_mixed_batches_in_pieces_give_the_same_weights_but_for_rounding(tmp_path, monkeypatch, loss):
    host = load_plugins(files=[Path(__file__).with_name("tight_plugin.py")])
    recipe = {**FIRST, "student": {"model": "tight"}, "objective": objective(loss)}
    found = []
    for limit in ("100000,100000", "40,512"):
        monkeypatch.setenv("KDCORE_TIGHT", limit)
        made_run = make_run(tmp_path / limit, recipe=recipe, host=host, sets=["execute.failure=retry"])
        stage = made_run.execute()["stages"][-1]
        key = stage["key"]
        found.append(load_file(tmp_path / limit / "store" / "results" / key / "student.safetensors"))
    assert [event["kind"] for event in stage["events"]][-1] == "pieces"
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)


TWO_VIEWS = {"name": "views", "weak": ["flip"], "strong": [{"name": "shift", "pixels": 2}]}


def test_mlkd_learns_from_two_views(tmp_path):
    recipe = {**RECIPE, "data": {**MIXED, "transforms": [TWO_VIEWS], "batch_size": 256}}
    terms = [{"loss": "cross_entropy"}, {"loss": "kd"}, {"loss": "mlkd", "views": 2, "weight": 0.05}]
    stage = make_run(tmp_path, recipe={**recipe, "objective": terms}).execute()["stages"][-1]
    row = stage["members"]["student"]["curve"][-1]
    assert row["accuracy"] > 0.3
    assert row["train.mlkd"] > 0
    assert "share.kd" in row
    assert "share.mlkd" not in row, "gradient shares are measured on plain samples, 143 here"


def test_mlkd_of_two_views_is_refused_where_the_data_have_one(tmp_path):
    recipe = {**RECIPE, "objective": [{"loss": "cross_entropy"}, {"loss": "mlkd", "views": 2}]}
    with pytest.raises(RecipeError, match=r"objective\[1\].views: 2 needs the transform 'views'. Add"):
        make_run(tmp_path, recipe=recipe)


def test_two_views_are_estimated_to_cost_what_they_do(tmp_path):
    recipe = {**FIRST, "data": {**MIXED, "transforms": [TWO_VIEWS]}, "strategy": "distill"}
    run = make_run(tmp_path, recipe=recipe)
    done = run.execute()["stages"]
    measure = Measure(CATALOG, DataCache(CATALOG), view_of(recipe["data"]).data)
    expected = [sum(stage["flops"].values()) for stage in done]
    assert sorted(measure.stage(stage) for stage in run.stages.values()) == sorted(expected)
