"""What CRD, OFD and ReviewKD promise beside their numbers: memories, margins, shapes, and that a run resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kdcore_features.crd import CRD, moved
from kdcore_features.ofd import OFD
from kdcore_features.options import CRDOptions, OFDOptions, ReviewKDOptions
from kdcore_features.reviewkd import ReviewKD
from safetensors.torch import load_file
from small import RECIPE, die_at_step_30, make_run, weights
from torch import Tensor

from kdcore import Batch, Outputs, PlanError, Shapes

SAMPLES, ROWS = 40, 6


def crd(labels: Tensor | None = None, **options: Any) -> CRD:
    labels = torch.arange(SAMPLES) % 4 if labels is None else labels
    torch.manual_seed(0)
    shapes = Shapes(int(labels.max()) + 1, len(labels), {"pooled": (5,)}, {"pooled": (7,)}, labels)
    return CRD.build(shapes, CRDOptions(feat_dim=8, **options))


def step(module: CRD, seed: int, index: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """One batch through the loss."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(ROWS, width, generator=generator) * scale for width in (5, 7))
    index = torch.randperm(SAMPLES, generator=generator)[:ROWS] if index is None else index
    torch.manual_seed(seed)
    logits = torch.zeros(ROWS, 4)
    batch = Batch(logits, None, index, 0.0)
    found: Tensor = module(Outputs(logits, {"pooled": student}), Outputs(logits, {"pooled": teacher}), batch)
    return found


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, now in module.state_dict().items() if not torch.equal(now, before[name])}


# ---------------------------------------------------------------- contrast


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30).filter(lambda labels: len(set(labels)) > 1))
def test_every_sample_of_another_class_is_drawn_and_none_of_its_own(labels):
    labels = torch.tensor(labels)
    module = crd(labels, negatives=1)
    module.negatives = 1000
    drawn = module.draw(torch.arange(len(labels)))
    for own, found in zip(labels, drawn, strict=True):
        assert set(found.tolist()) == set(torch.nonzero(labels != own).flatten().tolist())


def test_a_small_split_gives_as_many_negatives_as_any_sample_has():
    assert crd().negatives == 30
    assert crd(negatives=7).negatives == 7
    assert crd(torch.tensor([0, 0, 0, 1, 2])).negatives == 2


def test_one_class_has_nothing_to_contrast():
    with pytest.raises(PlanError, match="all samples are of one class"):
        crd(torch.zeros(5, dtype=torch.int64))


def test_a_step_of_training_moves_the_rows_of_its_batch_and_no_others():
    module = crd()
    before, index = state(module), torch.tensor([3, 9, 11, 20, 38, 0])
    step(module, 0, index)
    for name in ("bank_student", "bank_teacher"):
        changed = (module.get_buffer(name) != before[name]).any(1)
        assert torch.equal(changed.nonzero().flatten(), index.sort().values)
        torch.testing.assert_close(module.get_buffer(name)[index].norm(dim=1), torch.ones(ROWS))


def test_z_is_that_of_the_first_batch_and_keeps_no_graph():
    module = crd()
    step(module, 0)
    first = module.log_z.clone()
    assert torch.isfinite(first).all()
    step(module, 1)
    assert torch.equal(module.log_z, first)
    assert not any(buffer.requires_grad for buffer in module.buffers())


def test_a_sample_that_is_twice_in_a_batch_has_one_memory_whatever_is_written_first(monkeypatch):
    """Two views of a batch keep their positions; a GPU copies rows in any order."""
    bank, index, vectors = torch.randn(8, 4), torch.tensor([5, 2, 5, 1, 2]), torch.randn(5, 4)
    backwards = torch.Tensor.index_copy
    expected = moved(bank, index[2:], vectors[2:], 0.5)
    assert torch.equal(moved(bank, index, vectors, 0.5), expected)
    monkeypatch.setattr(
        torch.Tensor, "index_copy", lambda self, dim, at, rows: backwards(self, dim, at.flip(0), rows.flip(0))
    )
    assert torch.equal(moved(bank, index, vectors, 0.5), expected)


def test_evaluation_leaves_the_memories_as_they_are():
    module = crd().eval()
    before = state(module)
    step(module, 0)
    same = [
        name for name, now in module.state_dict().items() if torch.equal(now.nan_to_num(), before[name].nan_to_num())
    ]
    assert set(same) == set(before)


def test_the_gradient_is_exact_after_the_first_batch():
    module = crd().double()
    student, teacher = (
        torch.randn(ROWS, 5).double(),
        Outputs(torch.zeros(ROWS, 4), {"pooled": torch.randn(ROWS, 7).double()}),
    )
    batch = Batch(torch.zeros(ROWS), None, torch.arange(ROWS), 0.0)
    module(Outputs(teacher.logits, {"pooled": student}), teacher, batch)
    module.eval()

    def value(feature: Tensor) -> Tensor:
        torch.manual_seed(0)
        return module(Outputs(teacher.logits, {"pooled": feature}), teacher, batch)

    assert torch.autograd.gradcheck(value, student.requires_grad_())


@pytest.mark.parametrize("temperature", [0.001, 0.07, 10.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_contrast_is_finite_for_any_temperature_and_for_features_that_are_zero(temperature, scale):
    module = crd(temperature=temperature)
    for seed in (0, 1):
        found = step(module, seed, scale=scale)
        gradients = torch.autograd.grad(found, list(module.parameters()))
        assert torch.isfinite(found)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_run_that_was_killed_goes_on_with_its_memories(tmp_path):
    """Bit for bit: the banks are in checkpoints, and negatives depend on the step alone."""
    term = {"loss": "crd", "weight": 0.8, "negatives": 100, "feat_dim": 16}
    recipe = {**RECIPE, "student": {**RECIPE["student"], "size": 2}, "objective": [{"loss": "cross_entropy"}, term]}
    sets = ["train.epochs=4", "execute.checkpoint_seconds=0"]
    make_run(tmp_path / "a", recipe=recipe, sets=sets).execute()
    die_at_step_30(make_run(tmp_path / "b", recipe=recipe, sets=sets))
    saved = load_file(next((tmp_path / "b" / "store").rglob("tensors.safetensors")))
    bank = saved["student/term.crd/bank_student"]
    assert bank.shape[1] == 16
    assert torch.isfinite(saved["student/term.crd/log_z"]).all()
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(len(bank)))  # three epochs have seen every sample
    make_run(tmp_path / "b", recipe=recipe, sets=sets).execute()
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


# ---------------------------------------------------------------- margins


def ofd(**norms: tuple[Tensor, Tensor]) -> OFD:
    torch.manual_seed(0)
    return OFD.build(Shapes(2, 8, {"stage1_pre": (3, 4, 4)}, {"stage1_pre": (5, 4, 4)}, norms=norms), OFDOptions())


def compare(module: OFD, student: Tensor, teacher: Tensor) -> Tensor:
    logits = torch.zeros(len(student), 2)
    found: Tensor = module(*(Outputs(logits, {"stage1_pre": side}) for side in (student, teacher)), None)
    return found


def test_a_source_without_norms_gets_the_margin_that_its_responses_have():
    """The mean of all negative responses of a normal variable is what the closed form gives."""
    weight, bias = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0]), torch.tensor([0.0, 0.3, -1.0, 1.0, 9.0])
    measured, known = ofd(), ofd(stage1_pre=(weight, bias))
    for seed in range(20):
        torch.manual_seed(seed)
        teacher = torch.randn(64, 5, 4, 4) * weight[:, None, None] + bias[:, None, None]
        found = compare(measured, torch.randn(64, 3, 4, 4), teacher)
        assert torch.isfinite(found)
    margin = measured.margins[0](teacher)
    torch.testing.assert_close(margin[:4], known.margins[0](teacher)[:4], rtol=0.02, atol=0)
    assert margin[4] == 0  # none was negative
    assert known.margins[0](teacher)[4] == -3


def test_measuring_ends_with_training():
    module = ofd()
    compare(module, torch.randn(4, 3, 4, 4), torch.randn(4, 5, 4, 4))
    before = state(module)
    compare(module.eval(), torch.randn(4, 3, 4, 4), torch.randn(4, 5, 4, 4))
    assert not changed(before, module)


@pytest.mark.parametrize("feature", [torch.zeros(4, 3, 4, 4), torch.ones(4, 3, 4, 4)], ids=["zero", "alike"])
def test_ofd_is_finite_for_rows_that_are_zero_or_alike(feature):
    feature.requires_grad_()
    found = compare(ofd(), feature, torch.zeros(4, 5, 4, 4))
    (gradient,) = torch.autograd.grad(found, feature)
    assert torch.isfinite(found)
    assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------- shapes

MAPS = {"stage1": (3, 8, 6), "stage2": (5, 4, 3), "pooled": (5,)}


@pytest.mark.parametrize("shallower", ["student", "teacher"])
def test_the_deepest_stages_correspond_where_one_model_has_fewer(shallower):
    few, many = {"stage3": (4, 7, 7), "pooled": (9,)}, MAPS
    sides = (few, many) if shallower == "student" else (many, few)
    module = ReviewKD.build(Shapes(2, 8, *sides), ReviewKDOptions())
    outputs = [
        Outputs(torch.zeros(4, 2), {tap: torch.randn(4, *shape) for tap, shape in side.items()}) for side in sides
    ]
    assert torch.isfinite(module(*outputs, None))
    assert module.min_batch == 2  # a pooled vector is a map of one position


@pytest.mark.parametrize(("loss", "options"), [(OFD, OFDOptions()), (ReviewKD, ReviewKDOptions())])
def test_tokens_are_refused_by_name(loss, options):
    with pytest.raises(PlanError, match=r"tap 'stage1': shape \[16, 64\] is no map"):
        loss.build(Shapes(2, 8, {"stage1": (3, 8, 8)}, {"stage1": (16, 64)}), options)
