"""The losses on relations and maps keep their promises where public code does not, and are the papers' where named."""

from __future__ import annotations

import itertools
from dataclasses import replace

import kdcore_features
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kdcore_features.at import at_loss
from kdcore_features.cc import cc_loss
from kdcore_features.irg import irg_loss
from kdcore_features.maps import averages
from kdcore_features.nst import nst_loss
from kdcore_features.options import ATOptions, PKTOptions, RKDOptions, SPOptions
from kdcore_features.pkt import pkt_loss
from kdcore_features.rkd import rkd_loss
from kdcore_features.sp import SP, sp_loss
from torch import nn

from kdcore import Outputs, PlanError, Shapes
from kdcore.testing import Subject, parametrize_with_checks, subjects_of
from kdcore.testing.made_up import Made, value
from kdcore.training.member import tap_names

NAMES = ("at", "sp", "pkt", "rkd", "nst", "cc", "irg")
SUBJECTS = {one.name: one for one in subjects_of(kdcore_features) if one.kind == "loss" and one.name in NAMES}


def other_way(name, options):
    return Subject("loss", name, SUBJECTS[name].target, options)


PAPERS = [other_way("at", ATOptions(variant="paper", p=3)), other_way("pkt", PKTOptions(variant="paper"))]


@parametrize_with_checks(*SUBJECTS.values(), *PAPERS, other_way("rkd", RKDOptions(squared=True)))
def test_conforms(check):
    check()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- rows that are zero or alike


def irg_alone(student, teacher):
    """Of two stages, the second twice the first: no logits."""
    nothing = torch.zeros(len(student), 3)
    return irg_loss([student, 2 * student], [teacher, 2 * teacher], (nothing, nothing))


RELATIONS = {
    "sp": sp_loss,
    "pkt": pkt_loss,
    "pkt of the paper": lambda s, t: pkt_loss(s, t, variant="paper"),
    "rkd": rkd_loss,
    "rkd of squares": lambda s, t: rkd_loss(s, t, squared=True),
    "cc": cc_loss,
    "irg": irg_alone,
}
HAZARDS = {
    "a zero row": lambda rows: rows.index_fill(0, torch.tensor([2]), 0),
    "two zero rows": lambda rows: rows.index_fill(0, torch.tensor([1, 4]), 0),
    "two equal rows": lambda rows: rows[[0, 1, 2, 3, 4, 0]],
    "three equal rows and a zero one": lambda rows: rows[[0, 1, 0, 3, 4, 0]].index_fill(0, torch.tensor([3]), 0),
    "two rows that differ by rounding": lambda rows: torch.cat([rows[:5], rows[:1].nextafter(rows.new_tensor(9.0))]),
    "a row and its opposite": lambda rows: torch.cat([rows[:5], -rows[:1]]),
    "equal rows alone": lambda rows: rows[:1].repeat(6, 1),
    "zero rows alone": torch.zeros_like,
}


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("loss", RELATIONS)
def test_zero_and_equal_rows_have_a_finite_value_and_a_gradient_that_is_as_small_as_without(loss, hazard, where):
    """Public code gives NaN (PKT), or a gradient of 1e11 to 1e12 (SP, RKD)."""
    sides = {"student": normal(6, 8).float(), "teacher": normal(6, 5, seed=1).float()}
    plain = gradient(RELATIONS[loss], **sides)[1].abs().max()
    sides.update({side: HAZARDS[hazard](rows) for side, rows in sides.items() if where in (side, "both")})
    found, grad = gradient(RELATIONS[loss], **sides)
    assert found.isfinite()
    assert grad.isfinite().all()
    assert grad.abs().max() <= 20 * plain


def gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    found = loss(student, teacher)
    return found.detach(), torch.autograd.grad(found, student)[0]


@pytest.mark.parametrize("loss", [at_loss, nst_loss, lambda s, t: at_loss(s, t, p=1, variant="paper")])
def test_dead_channels_and_maps_of_zeros_have_finite_gradients(loss):
    maps = normal(4, 3, 5, 5).relu().float()
    maps[1] = 0
    maps[:, 2] = 0
    found, grad = gradient(loss, maps, normal(4, 6, 5, 5, seed=1).float())
    assert found.isfinite()
    assert grad.isfinite().all()
    assert grad.abs().max() < 1


# ---------------------------------------------------------------- what they compute


def test_pkt_of_the_paper_leaves_out_the_sample_itself_and_sums_a_row():
    student, teacher = normal(5, 4), normal(5, 7, seed=1)

    def chances(rows, i):
        near = {j: (1 + F.cosine_similarity(rows[i], rows[j], 0)) / 2 for j in range(5) if j != i}
        return {j: k / sum(near.values()) for j, k in near.items()}

    pairs = [(chances(teacher, i), chances(student, i)) for i in range(5)]
    expected = sum(t[j] * (t[j] / s[j]).log() for t, s in pairs for j in t) / 5
    torch.testing.assert_close(pkt_loss(student, teacher, variant="paper"), expected, rtol=1e-5, atol=0)


def test_at_of_the_paper_is_half_the_distance_of_absolute_maps():
    student, teacher = normal(3, 4, 6, 6), normal(3, 2, 6, 6, seed=1)
    expected = torch.stack([(a / a.norm() - b / b.norm()).norm() / 2 for a, b in zip(
        student.abs().pow(3).sum(1), teacher.abs().pow(3).sum(1), strict=True)]).mean()  # fmt: skip
    torch.testing.assert_close(at_loss(student, teacher, p=3, variant="paper"), expected)


@pytest.mark.parametrize("gamma", [0.1, 0.4, 2.0])
def test_the_series_of_cc_ends_in_the_gaussian_kernel(gamma):
    student, teacher = normal(6, 4), normal(6, 9, seed=1)
    own, other = (torch.exp(-gamma * torch.cdist(x, x).square()) for x in (F.normalize(student), F.normalize(teacher)))
    expected = (own - other).square().mean()
    torch.testing.assert_close(cc_loss(student, teacher, gamma=gamma, order=30), expected)
    errors = [(cc_loss(student, teacher, gamma=gamma, order=order) - expected).abs() for order in (2, 6, 18)]
    assert errors == sorted(errors, reverse=True)


def test_irg_is_the_sum_of_its_vertices_edges_and_transformations():
    maps = [normal(4, 4, 6, 6), normal(4, 8, 3, 3)], [normal(4, 6, 2, 2, seed=seed) for seed in (1, 2)]
    logits = normal(4, 3), normal(4, 3, seed=1)
    stages = [[tap.mean((2, 3)) for tap in side] for side in maps]

    def edges(rows):
        square = torch.cdist(rows, rows).square()
        return square / square.max()

    def moves(before, after):
        if after.shape[1] == 2 * before.shape[1]:  # neighbouring channels are averaged
            after = (after[:, 0::2] + after[:, 1::2]) / 2
        square = (after - before).square().sum(1)
        return square / square.max()

    own, other = ([edges(rows) for rows in side] for side in stages)
    edge = sum(F.mse_loss(a, b) for a, b in zip(own, other, strict=True)) / 2
    change = F.mse_loss(moves(*stages[0]), moves(*stages[1])) + F.mse_loss(own[1] - own[0], other[1] - other[0])
    parts = {"vertex": F.mse_loss(*logits), "edge": edge, "transformation": change}
    for name, part in parts.items():
        weights = dict.fromkeys(parts, 0.0) | {name: 2.0}
        torch.testing.assert_close(irg_loss(*maps, logits, **weights), 2 * part)
    whole = 0.1 * parts["vertex"] + 5 * edge + 5 * change
    torch.testing.assert_close(irg_loss(*maps, logits), whole)


def test_sp_compares_the_last_stage_alone_unless_told_otherwise():
    """The published weight of 3000 belongs to one stage."""
    stages = {"stage1": normal(4, 3, 4, 4), "stage2": normal(4, 6, 2, 2)}
    others = {name: 2 + normal(*tap.shape, seed=1) for name, tap in stages.items()}
    shapes = Shapes(3, 64, *({name: tuple(tap.shape[1:]) for name, tap in side.items()} for side in (stages, others)))
    own, other = (Outputs(normal(4, 3), side) for side in (stages, others))
    found, everything = (SP.build(shapes, SPOptions(deepest=deepest))(own, other, None) for deepest in (True, False))
    last = sp_loss(stages["stage2"], others["stage2"])
    torch.testing.assert_close(found, last)
    torch.testing.assert_close(everything, last + sp_loss(stages["stage1"], others["stage1"]))


def test_maps_of_many_channels_and_few_places_are_compared_without_a_number_for_each_pair_of_channels():
    def naive(student, teacher):
        own, other = (F.normalize(maps.flatten(2), dim=2) for maps in (student, teacher))
        kernels = [torch.einsum("bip,bjp->bij", *pair).square().mean() for pair in ((own, own), (other, other))]
        return sum(kernels) - 2 * torch.einsum("bip,bjp->bij", own, other).square().mean()

    student, teacher = normal(2, 40, 2, 2), normal(2, 60, 2, 2, seed=1)
    for expected, found in zip(gradient(naive, student, teacher), gradient(nst_loss, student, teacher), strict=True):
        torch.testing.assert_close(found, expected)
    wide = [torch.empty(256, 2048, 2, 2, device="meta", requires_grad=True) for _ in range(2)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        nst_loss(*wide)
    assert max(kept) <= wide[0].numel()


def test_irg_takes_the_mean_of_tokens_and_not_of_their_channels():
    """After a transformer's norm the channels of a token have a mean of 0: nothing would be left to compare."""
    sides = [[normal(4, 5, 8, seed=seed), normal(4, 5, 6, seed=seed + 1)] for seed in (0, 2)]
    logits = normal(4, 3), normal(4, 3, seed=1)
    means = [[tokens.mean(1) for tokens in side] for side in sides]
    torch.testing.assert_close(irg_loss(*sides, logits), irg_loss(*means, logits))


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(1, 30))
def test_averages_are_those_of_adaptive_pooling(length, count):
    signal = normal(1, 2, length)
    if count <= length:
        torch.testing.assert_close(signal @ averages(length, count, signal).T, F.adaptive_avg_pool1d(signal, count))


@pytest.mark.parametrize("name", ["at", "nst"])
@pytest.mark.parametrize(("own", "other"), list(itertools.permutations([(8, 8), (4, 4), (3, 7)], 2)))
def test_maps_of_any_two_sizes_are_compared(name, own, other):
    loss = {"at": at_loss, "nst": nst_loss}[name]
    assert loss(normal(2, 3, *own), normal(2, 5, *other, seed=1)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_its_teacher_has_no_loss(name):
    loss = Made.of(SUBJECTS[name].load(), SUBJECTS[name].example(), SUBJECTS[name].catalog)
    inputs = loss.given(dtype=torch.float64)
    taps = inputs.teacher.taps
    own = Outputs(inputs.student.logits, dict(zip(inputs.student.taps, taps.values(), strict=True)))
    same = replace(inputs, student=own, teacher=Outputs(own.logits, taps))
    assert value(loss.module, same).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["at", "nst"])
def test_a_vector_where_a_map_is_needed_is_refused_by_the_name_of_its_tap(name):
    shapes = Shapes(2, 64, {"stage1": (4, 8, 8)}, {"stage1": (16,)})
    with pytest.raises(PlanError, match=r"tap 'stage1' is no map\. Name taps of maps \[C, H, W\]"):
        SUBJECTS[name].load().build(shapes, SUBJECTS[name].example())


@pytest.mark.parametrize("name", ["at", "sp", "nst", "irg"])
def test_losses_of_stages_are_checked_on_three_of_them(name):
    made = Made.of(SUBJECTS[name].load(), SUBJECTS[name].example(), SUBJECTS[name].catalog)
    assert list(made.shapes.student) == ["stage1", "stage2", "stage3"]


def test_every_loss_takes_the_last_stage_of_a_model_that_has_twelve():
    """A vision transformer of timm has a tap for each block."""
    model = nn.Module()
    stages = [f"stage{i}" for i in range(1, 13)]
    model.taps = dict.fromkeys(["stem", *stages, *(f"{stage}_pre" for stage in stages), "pooled"], "")
    for subject in subjects_of(kdcore_features):
        loss = subject.load() if subject.kind == "loss" else None
        if "taps" not in getattr(loss, "needs", ()) or subject.name == "fitnet":  # its hint is stage2
            continue
        for patterns in loss.taps(subject.entry.options_class()(**subject.entry.options_class().example)):
            found = tap_names(model, [patterns] if isinstance(patterns, str) else patterns)
            assert {"stage12", "stage12_pre", "pooled"} & set(found), subject.name
            assert len({tap.endswith("_pre") for tap in found if tap.startswith("stage")}) < 2, subject.name
