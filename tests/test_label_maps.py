"""A teacher of other classes: its probabilities are summed, and everything else goes on as if they were the data's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kdcore_search.candidates import named
from safetensors.torch import load_file, save_file
from small import RECIPE, die_at_step_30, file_hash, make_run
from torch import nn

import kdcore
from kdcore.data import DataInfo
from kdcore.errors import PlanError, PluginError, RecipeError
from kdcore.losses import dkd_loss, kd_loss
from kdcore.plan import ModelRef, Spec
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load
from kdcore.testing.strategy import run_view
from kdcore.training.ema import Average
from kdcore.training.evaluate import evaluating
from kdcore.training.mapped import Mapped
from kdcore.training.member import Tapped, build_model, tap_names

SUBSET = {"name": "subset", "of": 10, "classes": [7, 2, 5]}
GROUPS = {"name": "groups", "of": 10, "groups": [[0, 3, 9], [1], [2, 4]]}
THREE = {"name": "synthetic", "classes": 3, "samples": 300, "test_samples": 60, "size": 8, "channels": 1, "noise": 0.5}
TEN = {**THREE, "classes": 10}


class Norm(nn.Module):
    """A network with batch statistics, taps at all depths and a named norm."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.taps, self.norms = {"whole": "", "norm": "body.1"}, {"norm": "body.1"}
        self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))

    def forward(self, images):
        return self.body(images)


@st.composite
def maps(draw):
    """A number of classes, and disjoint groups of some of them."""
    classes = draw(st.integers(2, 12))
    order = draw(st.permutations(range(classes)))
    count = draw(st.integers(2, classes))
    owners = draw(
        st.lists(st.integers(0, count), min_size=classes - count, max_size=classes - count)
    )  # count: left out
    groups = [[index] for index in order[:count]]
    for index, owner in zip(order[count:], owners, strict=True):
        if owner < count:
            groups[owner].append(index)
    return classes, tuple(map(tuple, groups))


# ---------------------------------------------------------------- the maths


@given(maps(), st.integers(0, 999), st.sampled_from([1.0, 30.0, 1e4]))
def test_mapped_probabilities_are_sums_renormalised_over_what_is_covered(made, seed, scale):
    classes, groups = made
    logits = scale * torch.randn(4, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    covered = [index for group in groups for index in group]
    probabilities = logits[:, covered].softmax(1)
    expected = torch.stack([probabilities[:, [covered.index(i) for i in group]].sum(1) for group in groups], 1)
    found = Mapped(nn.Identity(), classes, groups)(logits)
    torch.testing.assert_close(found.softmax(1), expected, rtol=1e-10, atol=1e-12)
    assert found.dtype == torch.float64


def test_a_subset_takes_the_logits_as_they_are():
    logits = torch.randn(3, 6)
    assert torch.equal(Mapped(nn.Identity(), 6, ((5,), (0,), (2,)))(logits), logits[:, [5, 0, 2]])


def test_the_gradient_through_a_map_is_that_of_its_formula():
    mapped = Mapped(nn.Identity(), 6, ((5, 1), (0,), (2, 3)))
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mapped, (logits,))
    assert torch.autograd.gradgradcheck(mapped, (logits,))
    mapped(logits).sum().backward()
    assert not logits.grad[:, 4].any(), "a class that nobody covers gets no gradient"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_summed_in_float32(dtype):
    mapped = Mapped(nn.Identity(), 6, ((5, 1), (0,), (2, 3)))
    logits = (1e4 * torch.randn(3, 6)).to(dtype)
    assert mapped(logits).dtype == torch.float32
    assert torch.equal(mapped(logits), mapped(logits.float()))


def test_a_mapped_model_compiles_as_one_graph():
    mapped = Mapped(Norm(10), 10, ((5, 1), (0,), (2, 3))).eval()
    images = torch.randn(4, 1, 8, 8)
    compiled = torch.compile(mapped, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), mapped(images))


# ---------------------------------------------------------------- a module like the one it wraps


def test_names_of_weights_taps_and_norms_stay():
    network = Norm(10)
    mapped = Mapped(network, 10, ((5, 1), (0,)))
    assert list(mapped.state_dict()) == list(network.state_dict())
    other = Mapped(Norm(10), 10, ((5, 1), (0,)))
    other.load_state_dict(network.state_dict())
    images = torch.randn(4, 1, 8, 8)
    with evaluating(mapped, other):
        assert torch.equal(mapped(images), other(images))
    assert tap_names(mapped, ["*"]) == ("whole", "norm")
    tapped = Tapped(mapped, frozenset({"whole", "norm"}))
    mapped(images)
    assert tapped.taps["whole"].shape == (4, 10)
    assert tapped.taps["norm"].shape == (4, 64)
    assert mapped.get_submodule(mapped.norms["norm"]) is network.body[1]
    with pytest.raises(RuntimeError, match=r"Missing.*body"):
        other.load_state_dict({})


def test_a_moving_average_of_a_mapped_model_is_saved_and_read():
    mapped = Mapped(Norm(10), 10, ((5, 1), (0,)))
    average = Average(mapped, 0.5)
    mapped(torch.randn(4, 1, 8, 8))
    average.update(mapped)
    average.update(mapped)
    again = Average(Mapped(Norm(10), 10, ((5, 1), (0,))), 0.5)
    again.load_state_dict(average.state_dict())
    assert "module.body.2.weight" in average.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), again.parameters(), strict=True))


# ---------------------------------------------------------------- in a recipe


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The weights of a teacher of ten classes, with a card."""
    root = tmp_path_factory.mktemp("ten")
    make_run(root, recipe={**RECIPE, "data": {**TEN, "batch_size": 64}}).execute()
    return next(root.glob("store/results/*/teacher.safetensors"))


def recipe(stored, label_map=None, **changes):
    teacher = {"weights": str(stored)} | ({} if label_map is None else {"label_map": label_map})
    return {**RECIPE, "data": {**THREE, "batch_size": 32}, "teacher": teacher, **changes}


@pytest.mark.parametrize("label_map", [SUBSET, GROUPS])
@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_a_stored_teacher_of_ten_classes_teaches_three(tmp_path, stored, label_map, loss):
    objective = [{"loss": "cross_entropy"}, {"loss": loss}]
    made = make_run(tmp_path, recipe=recipe(stored, label_map, objective=objective))
    result = made.execute()
    teacher = result["stages"][-1]["members"]["teacher"]
    assert 0 <= teacher["test_accuracy"] <= 1
    assert teacher["flops"] > 0
    kept = next(tmp_path.glob("store/results/*/teacher.safetensors"))
    before, after = load_file(stored), load_file(kept)
    assert {name: tensor.tolist() for name, tensor in after.items()} == {n: t.tolist() for n, t in before.items()}
    assert kdcore.load_model(kept).network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert kdcore.load_model(tmp_path / "run" / "student.safetensors").card.classes == 3


def test_a_mapped_model_gives_what_its_weights_give_of_the_mapped_classes(stored):
    catalog = load_plugins().catalog
    entry = catalog.find("model", "mlp")
    ref = ModelRef(entry.full_name, entry.check({"size": 2, "width": 32}, ""), str(stored))
    spec = Spec("core/subset", {"of": 10, "classes": (7, 2, 5)})
    whole = build_model(ref, catalog, DataInfo((1, 8, 8), 10), 0)
    part = build_model(replace(ref, label_map=spec), catalog, DataInfo((1, 8, 8), 3), 0)
    images = torch.randn(5, 1, 8, 8)
    with evaluating(whole, part):
        assert torch.equal(part(images), whole(images)[:, [7, 2, 5]])


HINT = """
import kdcore
from torch import nn

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("hint", Hint)
    registry.model("net", lambda options, data: Net(data))

class Net(nn.Sequential):
    taps, norms = {"pooled": "1"}, {"pooled": "1"}

    def __init__(self, data):
        super().__init__(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, data.classes))

class Hint(nn.Module):
    needs = frozenset({"taps"})

    @staticmethod
    def taps(options):
        return ("pooled",), ("pooled",)

    @classmethod
    def build(cls, shapes, options):
        assert shapes.classes == 3 and shapes.teacher == {"pooled": (64,)}
        assert [tensor.shape for tensor in shapes.norms["pooled"]] == [(64,), (64,)]
        return cls()

    def forward(self, student, teacher, batch):
        assert teacher.logits.shape[1] == 3
        return (student.taps["pooled"] - teacher.taps["pooled"]).pow(2).mean()
"""


def test_a_mapped_teachers_features_and_norms_are_where_its_model_says(tmp_path, plugin_file):
    host = load_plugins(files=[plugin_file("hinted", HINT)])
    table = {**RECIPE, "data": {**THREE, "batch_size": 32}, "student": {"model": "net"}, "train": {"epochs": 1}}
    table |= {"teacher": {"model": "net", "label_map": SUBSET}, "objective": [{"loss": "kd"}, {"loss": "hint"}]}
    assert (
        "train.hint"
        in make_run(tmp_path, recipe=table, host=host).execute()["stages"][-1]["members"]["student"]["curve"][0]
    )


def test_a_run_with_a_map_goes_on_after_a_kill_with_the_same_bits(tmp_path, stored):
    changes = {"train": {"epochs": 6}, "execute": {"log_every": 5, "checkpoint_seconds": 0}}
    for folder in ("whole", "killed"):
        made = make_run(tmp_path / folder, recipe=recipe(stored, GROUPS, **changes))
        if folder == "killed":
            die_at_step_30(made)
            made = make_run(tmp_path / folder, recipe=recipe(stored, GROUPS, **changes))
        made.execute()
    hashes = {file_hash(tmp_path / folder / "run" / "student.safetensors") for folder in ("whole", "killed")}
    assert len(hashes) == 1


def test_a_teacher_without_weights_is_trained_through_its_map(tmp_path):
    teacher = {"model": "mlp", "size": 2, "label_map": GROUPS}
    result = make_run(tmp_path, recipe={**RECIPE, "data": {**THREE, "batch_size": 32}, "teacher": teacher}).execute()
    assert result["stages"][0]["members"]["teacher"]["test_accuracy"] > 0.5


def keys(table):
    made, host = load(table), load_plugins()
    view, _ = compile_recipe(made, host.catalog)
    return view.label_only("teacher", view.teacher)


def test_a_map_is_part_of_a_stages_identity_and_no_map_is_not(stored):
    plain, subset, groups = (keys(recipe(stored, m)) for m in (None, SUBSET, GROUPS))
    assert len({stage.identity for stage in (plain, subset, groups)}) == 3
    assert "label_map" not in repr(kdcore.codec.encode(plain, lambda stage: ""))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("label_map", "text"),
    [
        ({"name": "subset", "of": 10, "classes": [1, 2, 1]}, r"class 1 is named twice, by class 0 and 2"),
        ({"name": "subset", "of": 10, "classes": [1, 2, 10]}, r"class 10, which is not within 0 and 9"),
        ({"name": "groups", "of": 10, "groups": [[1, -1], [2], [3]]}, r"class -1, which is not within 0 and 9"),
        ({"name": "groups", "of": 10, "groups": [[1], [], [3]]}, "class 1 has none of the teacher's classes"),
        ({"name": "groups", "groups": [[1], [3]]}, r"teacher.label_map.of: missing. Write the number of the teacher's"),
        ({"name": "subsets", "of": 10}, "unknown label map 'subsets'. Did you mean 'subset'"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused_before_torch(stored, label_map, text):
    with pytest.raises(RecipeError, match=text) as error:
        keys(recipe(stored, label_map))
    assert error.value.where.startswith("teacher.label_map")


def test_a_map_for_another_number_of_classes_is_refused(tmp_path, stored):
    made = make_run(tmp_path, recipe=recipe(stored, {"name": "subset", "of": 10, "classes": [1, 2]}))
    with pytest.raises(RecipeError, match="it is for 2 classes, the data have 3"):
        made.execute()


@pytest.mark.parametrize(
    ("label_map", "text"),
    [
        (
            None,
            r'10 classes, the data are .* of 3 classes. Give .* For .* label_map = { name = "subset", of = 10,',
        ),
        (
            {"name": "subset", "of": 12, "classes": [1, 2, 11]},
            r"teacher.label_map.of: 12 classes, but .* 1x8x8 images of 10",
        ),
    ],
)
def test_weights_of_other_classes_offer_a_map(tmp_path, stored, label_map, text):
    with pytest.raises(RecipeError, match=text):
        make_run(tmp_path, recipe=recipe(stored, label_map)).execute()


def test_weights_without_a_card_offer_a_map_where_the_head_alone_differs(tmp_path, stored):
    save_file(load_file(stored), tmp_path / "bare.safetensors")
    bare = {"model": "mlp", "size": 2, "width": 32, "weights": str(tmp_path / "bare.safetensors")}
    with pytest.raises(RecipeError, match=r"data's number of classes. For a teacher of 10 classes: label_map = "):
        make_run(tmp_path, recipe=recipe(stored, teacher=bare)).execute()
    with pytest.raises(RecipeError, match=r"data's number of classes\.$"):
        make_run(tmp_path, recipe=recipe(stored, teacher={**bare, "width": 16}), name="other").execute()


def test_a_student_has_no_map(stored):
    with pytest.raises(RecipeError, match=r"student\.label_map: a student has no label map"):
        keys(recipe(stored, student={"model": "mlp", "size": 1, "label_map": SUBSET}))


WRONG = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.label_map("wrong", lambda options, data: None)
    registry.label_map("halves", lambda options, data: (2 * data.classes, tuple((2 * i, 2 * i + 1) for i in range(3))))
    registry.label_map("twice", lambda options, data: (4, ((0,), (0,), (1,))))
"""


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("wrong", PluginError, "label map 'maps/wrong' gave nothing"),
        ("twice", RecipeError, "label map 'maps/twice': the teacher's class 0 is named twice"),
        ("halves", None, ""),
    ],
)
def test_a_plugin_may_offer_a_map(tmp_path, plugin_file, name, kind, text):
    host = load_plugins(files=[plugin_file("maps", WRONG)])
    table = {**RECIPE, "data": {**THREE, "batch_size": 32}, "teacher": {"model": "mlp", "size": 1, "label_map": name}}
    made = make_run(tmp_path, recipe=table, host=host)
    if kind is None:
        made.execute()
        return
    with pytest.raises(kind, match=text):
        made.execute()


@pytest.mark.parametrize("loss", [kd_loss, dkd_loss])
def test_logits_of_other_classes_name_the_label_map(loss):
    with pytest.raises(ValueError, match=r"\(4, 10\), student \(4, 3\).*label_map brings a teacher to them"):
        loss(torch.zeros(4, 3), torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"same rows and classes\.$"):
        loss(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64))


def test_a_candidate_has_no_map():
    view = run_view(model=lambda table: ModelRef("mlp", label_map=Spec("subset", table["label_map"])))
    with pytest.raises(RecipeError, match=r"strategy.candidates\[0\]: a candidate has no label map"):
        named(view, [{"model": "mlp", "label_map": SUBSET}])


# ---------------------------------------------------------------- from Python


IMAGES = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = {"train": (IMAGES[:100], torch.arange(100) % 3), "test": (IMAGES[100:], torch.arange(20) % 3)}


def distilled(root, **options):
    torch.manual_seed(0)
    given = {"epochs": 1, "batch_size": 32, "threads": 1, "quiet": True, "root": root, **DATA, **options}
    return kdcore.distill(student=Norm(3), **given)


def test_a_module_of_other_classes_teaches_through_a_map(tmp_path):
    torch.manual_seed(1)
    teacher = Norm(10)
    result = distilled(tmp_path, teacher=teacher, label_map=SUBSET)
    mapped = result.teacher()
    with evaluating(teacher, mapped):
        torch.testing.assert_close(mapped(IMAGES), teacher(IMAGES)[:, SUBSET["classes"]])


def test_a_module_of_other_classes_without_a_map_is_told_of_it(tmp_path):
    with pytest.raises(RecipeError, match=r"teacher=...\): it gives \(2, 10\) .* label_map = .*of = 10"):
        distilled(tmp_path, teacher=Norm(10))
    with pytest.raises(PlanError, match=r"\(2, 12\).*It must give \[B, 10\].*of = 12"):
        distilled(tmp_path, teacher=Norm(12), label_map=SUBSET)


def test_a_map_is_given_once(tmp_path):
    teacher = {"model": "mlp", "size": 2, "label_map": SUBSET}
    with pytest.raises(RecipeError, match=r"distill\(label_map=...\): the teacher's table has a label map too"):
        distilled(tmp_path, teacher=teacher, label_map=SUBSET)
