"""Hints, stages and singular vectors: adapters between any two features, hazards, and whole runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kdcore_features import adapters
from kdcore_features.ab import ab_loss
from kdcore_features.kdsvd import kdsvd_loss, leading, right_vectors
from kdcore_features.maps import match
from kdcore_features.options import FitNetOptions, FSPOptions, KDSVDOptions, VIDOptions
from kdcore_features.vid import VID, vid_loss
from torch import nn

from kdcore import Batch, Member, ModelRef, Options, Outputs, PlanError, Shapes, SourceSpec, Spec, Stage, Term
from kdcore.keys import code_of, names
from kdcore.plugins import load_plugins
from kdcore.testing import Subject, parametrize_with_checks, subjects_of

VECTOR, TOKENS, MAP = (5,), (7, 6), (4, 5, 3)
BATCH = Batch(torch.zeros(3, 1), None, None, 0.0)
SUBJECTS = {subject.name: subject for subject in subjects_of("features")}


def variant(name: str, **options) -> Subject:
    plain = SUBJECTS[name]
    return Subject("loss", name, plain.target, plain.entry.options_class()(**options))


@parametrize_with_checks(
    variant("fitnet", variant="paper"),
    variant("fitnet", adapter="attention"),
    variant("ft", variant="paper"),
)
def test_every_variant_conforms(check):
    check()


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("student", [VECTOR, TOKENS, MAP], ids=str)
@pytest.mark.parametrize("teacher", [(8,), (9, 12), (6, 2, 4)], ids=str)
def test_auto_leads_from_any_feature_to_any_other(student, teacher):
    adapter = adapters.auto(student, teacher, Options())
    found = adapter(torch.randn(3, *student))
    if len(student) == len(teacher) == 3:  # at the smaller size of the two
        assert found.shape == (3, 6, 2, 3)
    else:
        assert found.shape == (3, *teacher)


def test_auto_takes_attention_only_where_positions_differ():
    kinds = {
        (VECTOR, (8,)): nn.Linear,
        (TOKENS, (7, 9)): nn.Linear,
        (MAP, (8, 2, 2)): nn.Sequential,
        (TOKENS, (8, 9)): adapters.Attention,
        (TOKENS, MAP): adapters.Attention,
    }
    for (student, teacher), kind in kinds.items():
        assert type(adapters.auto(student, teacher, Options())) is kind


def test_attention_knows_where_the_student_s_positions_are():
    torch.manual_seed(0)
    adapter = adapters.attention(MAP, (6, 8), Options())
    with torch.no_grad():
        adapter.places.mul_(50)
    feature = torch.randn(2, *MAP)
    assert not torch.allclose(adapter(feature), adapter(feature.flip(2)))


@pytest.mark.parametrize(("name", "student"), [("linear", MAP), ("linear", (8, 6)), ("conv1x1", TOKENS)])
def test_an_adapter_that_does_not_fit_says_what_does(name, student):
    with pytest.raises(PlanError, match=r'does not lead from .* Write adapter = "auto"'):
        getattr(adapters, name)(student, TOKENS, Options())


def test_an_adapter_of_another_shape_than_the_teacher_s_is_no_broadcast():
    shapes = Shapes(3, 9, {"stage2": MAP}, {"stage2": (1, 5, 3)}, adapter=lambda *_: nn.Identity())
    options = FitNetOptions(adapter="acme/identity")
    loss = SUBJECTS["fitnet"].load().build(shapes, options)
    outputs = [Outputs(torch.zeros(3, 3), {"stage2": torch.zeros(3, *shape)}) for shape in (MAP, (1, 5, 3))]
    with pytest.raises(PlanError, match=r"gives \[3, 4, 5, 3\], the teacher's feature is \[3, 1, 5, 3\]"):
        loss(*outputs, BATCH)


@given(own=st.tuples(*[st.integers(1, 9)] * 2), other=st.tuples(*[st.integers(1, 9)] * 2))
@settings(max_examples=40)
def test_maps_match_at_the_smaller_size_by_adaptive_pooling(own, other):
    maps = torch.randn(2, 3, *own, dtype=torch.float64), torch.randn(2, 4, *other, dtype=torch.float64)
    size = min(own[0], other[0]), min(own[1], other[1])
    for found, given_map in zip(match(*maps), maps, strict=True):
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(given_map, size))


# ---------------------------------------------------------------- vid


def test_vid_is_finite_at_any_log_scale():
    scale = torch.tensor([-200.0, 0.0, 100.0, 1e4], requires_grad=True)
    mean = torch.randn(3, 4, 2, 2, requires_grad=True)
    loss = vid_loss(mean, torch.randn(3, 4, 2, 2), scale)
    assert all(g.isfinite().all() for g in (loss, *torch.autograd.grad(loss, [scale, mean])))


def test_vid_learns_its_variance_and_begins_where_it_is_told():
    shapes = Shapes(3, 9, {"stage1": MAP}, {"stage1": MAP}, adapter=lambda *s: adapters.auto(*s, Options()))
    loss = VID.build(shapes, VIDOptions(init_variance=2.0))
    (scale,) = (p for name, p in loss.named_parameters() if name.startswith("log_scales"))
    torch.testing.assert_close(F.softplus(scale) + loss.eps, torch.full((4,), 2.0))
    outputs = Outputs(torch.zeros(3, 3), {"stage1": torch.randn(3, *MAP)})
    loss(outputs, outputs, BATCH).backward()
    assert scale.grad.abs().min() > 0


# ---------------------------------------------------------------- stages


def test_ab_counts_neurons_inside_the_margin_alone():
    teacher = torch.tensor([[2.0, 2.0, -2.0, 0.0]])
    assert ab_loss([torch.tensor([[1.0, 5.0, -1.0, -3.0]])], [teacher]) == 0
    torch.testing.assert_close(ab_loss([torch.zeros(1, 4)], [teacher]), torch.tensor(4 * 0.003))


def test_fsp_says_which_taps_have_other_widths():
    shapes = Shapes(3, 9, {"stem": MAP, "stage1": MAP}, {"stem": MAP, "stage1": (8, 5, 3)})
    with pytest.raises(PlanError, match=r"'stage1' has 4 channels, the teacher's 'stage1' 8.*Name taps of equal width"):
        SUBJECTS["fsp"].load().build(shapes, FSPOptions())


def test_losses_of_neighbouring_stages_want_two_and_losses_of_maps_want_maps():
    for name, options in (("fsp", FSPOptions()), ("kdsvd", KDSVDOptions())):
        with pytest.raises(PlanError, match=r"1 tap to compare.*at least 2"):
            SUBJECTS[name].load().build(Shapes(3, 9, {"a": MAP}, {"a": MAP}), options)
        with pytest.raises(PlanError, match=r"tap 'a' is no map.*fitnet or vid"):
            SUBJECTS[name].load().build(Shapes(3, 9, {"a": TOKENS, "b": MAP}, {"a": MAP, "b": MAP}), options)


def test_ft_s_student_and_paraphraser_do_not_pull_at_each_other():
    loss = SUBJECTS["ft"].load().build(Shapes(3, 9, {"stage1": MAP}, {"stage1": MAP}), variant("ft").options)
    own, other = (Outputs(torch.zeros(3, 3), {"stage1": torch.randn(3, *MAP)}) for _ in range(2))
    parts = loss(own, other, BATCH)
    for name, trained in {"factor": {"translate"}, "reconstruction": {"paraphrase", "restore"}}.items():
        grads = torch.autograd.grad(parts[name], list(loss.parameters()), allow_unused=True, retain_graph=True)
        names = [n.partition(".")[0] for n, _ in loss.named_parameters()]
        assert {n for n, g in zip(names, grads, strict=True) if g is not None} == trained


# ---------------------------------------------------------------- singular vectors


def hazards():
    maps = torch.randn(2, 5, 4, 4)
    zero_channels = maps.clone()
    zero_channels[:, 2:] = 0
    twins = maps.clone()
    twins[:, 1] = twins[:, 0]
    orthogonal = torch.eye(16)[:5].view(1, 5, 4, 4).expand(2, -1, -1, -1).clone()  # all singular values are equal
    return {"zeros": torch.zeros(2, 5, 4, 4), "channels": zero_channels, "twins": twins, "equal": orthogonal}


@pytest.mark.parametrize("name", hazards())
@pytest.mark.parametrize("unfold", ["channels", "width"])
def test_degenerate_maps_have_finite_singular_vectors_and_gradients(name, unfold):
    student = [hazards()[name].requires_grad_() for _ in range(2)]
    for teacher in ([torch.randn(2, 5, 4, 4)] * 2, [hazards()[name]] * 2):
        loss = kdsvd_loss(student, teacher, unfold=unfold)
        assert all(g.isfinite().all() for g in (loss, *torch.autograd.grad(loss, student)))


@given(shape=st.tuples(*[st.integers(2, 6)] * 3), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_the_gradient_of_singular_vectors_is_that_of_autograd(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(2, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    count = min(shape[0], shape[1] * shape[2], 3)

    def projectors(vectors):  # free of signs
        return vectors[:, :, None] * vectors[:, None]

    weight = torch.randn(2, shape[0], shape[0], count, generator=generator, dtype=torch.float64)
    usual = torch.linalg.svd(feature.flatten(2).transpose(1, 2), full_matrices=False)[2].transpose(1, 2)[:, :, :count]
    found = right_vectors(feature, count, "channels")[0]
    expected, ours = (torch.autograd.grad((projectors(v) * weight).sum(), feature)[0] for v in (usual, found))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8 * (1 + expected.abs().max().item()))


def test_the_teacher_s_vectors_have_one_sign():
    feature = torch.randn(4, 5, 3, 3)
    vectors, values = leading(feature, 2, "channels")
    mirrored, _ = leading(-feature, 2, "channels")
    torch.testing.assert_close(vectors, mirrored)
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(values.norm(dim=2), torch.ones(4, 1))


# ---------------------------------------------------------------- whole runs

PATCHES = """
import kdcore
import torch
from torch import nn

class Patches(nn.Module):
    '''Four tokens of 4x4 pixels, and one transformer layer.'''
    taps = {"tokens": "layer"}

    def __init__(self, options, data):
        super().__init__()
        self.embed = nn.Conv2d(data.shape[0], 16, 4, stride=4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, data.classes)

    def forward(self, images):
        return self.head(self.layer(self.embed(images).flatten(2).transpose(1, 2)).mean(1))

def mean_of_map(student, teacher, options):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(student[0], teacher[0]))

@kdcore.hookimpl
def kdcore_register(registry):
    registry.model("patches", Patches)
    registry.adapter("mean-of-map", mean_of_map)
"""
RECIPE = """
seed = 0
threads = 1
device = "cpu"
data = {{ name = "digits", batch_size = 256 }}
teacher = {teacher}
student = {student}
train = {{ epochs = 2 }}
[[objective]]
loss = "cross_entropy"
[[objective]]
loss = "{loss}"
weight = 1.0
student = ["{own}"]
teacher = ["{other}"]
{more}
"""
CNN, TOKEN = '{ model = "cnn", size = 2, width = 0.25 }', '{ model = "patches" }'


@pytest.fixture
def recipe(tmp_path: Path, plugin_file):
    plugin_file("patches", PATCHES)

    def write(**parts) -> list[str]:
        (tmp_path / "recipe.toml").write_text(RECIPE.format(**{"more": "", **parts}))
        return [str(tmp_path / "recipe.toml"), "--plugin-file", str(tmp_path / "patches.py")]

    return write


@pytest.mark.parametrize(
    ("loss", "teacher", "student", "own", "other"),
    [("fitnet", CNN, TOKEN, "tokens", "stage2"), ("vid", TOKEN, CNN, "stage2", "tokens")],
)
def test_transformers_and_cnns_learn_from_each_other_s_features(cli, recipe, loss, teacher, student, own, other):
    done = cli("run", *recipe(loss=loss, teacher=teacher, student=student, own=own, other=other))
    assert done.code == 0, done.err
    (curves,) = Path("runs").glob("*/curves.csv")
    with curves.open() as file:
        found = [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == f"train.{loss}"]
    assert len(found) == 2
    assert found[1] < found[0]


def test_a_plugin_s_adapter_is_named_like_the_project_s_own(cli, recipe):
    parts = {"loss": "fitnet", "teacher": CNN, "student": CNN, "own": "stage2", "other": "pooled"}
    done = cli("run", *recipe(**parts, more='adapter = "mean-of-map"'))
    assert done.code == 0, done.err
    done = cli("run", *recipe(**parts, more='adapter = "mean-of-mad"'))
    assert done.code == 2
    assert "objective[1].adapter" in done.err
    assert "Did you mean 'mean-of-map'?" in done.err


def test_the_code_of_an_adapter_counts_in_the_key_of_a_stage_that_names_it(plugin_file, tmp_path):
    host = load_plugins(files=[plugin_file("patches", PATCHES)])
    student = Member(ModelRef("cnn"), terms=(Term("fitnet", options={"adapter": "mean-of-map"}), Term("vid")))
    stage = Stage("stage", {"student": student}, SourceSpec(Spec("digits")), 1)
    named = list(names(stage, host.catalog))
    assert [name for kind, name in named if kind == "adapter"] == ["patches/mean-of-map", "features/auto"]
    assert "patches" in [code["plugin"] for code in code_of(stage, host.catalog)]
