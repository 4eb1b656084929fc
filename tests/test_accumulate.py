"""train.accumulate: a batch in pieces from the start, with one update; losses that look across samples stay right."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from small import RECIPE, die_at_step_30, make_run, weights

from kdcore import autosize
from kdcore.errors import PlanError, RecipeError
from kdcore.plugins import load_plugins

IN_FOUR = ["train.accumulate=4"]
CLASS = ["objective.1.normalize=class"]
MODELS = """
import kdcore
import torch
from torch import nn

@kdcore.hookimpl
def kdcore_register(registry):
    registry.model("normal", lambda options, data: build(data, nn.BatchNorm1d(16), nn.Dropout(0.3)))
    registry.model("counting", lambda options, data: build(data, Counting()))

def build(data, *layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *layers, nn.ReLU(), nn.Linear(16, data.classes))

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("changed", "replaced"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, features):
        if self.training:
            self.changed += 1
            self.replaced = self.replaced + 1
        return features
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "seen_pieces.py"
    file.write_text(MODELS)
    return load_plugins(files=[file])


def run(root, host, *sets, **recipe):
    made = make_run(root, recipe={**RECIPE, **recipe}, host=host, sets=["train.teacher.epochs=1", *sets])
    return made.execute(), load_file(made.folder / "student.safetensors")


def close(one, other, rtol=1e-4, atol=1e-5):
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "sets",
    [
        ["data.batch_size=100", "train.clip=0.1", "train.ledger=2", *CLASS],
        pytest.param(["objective.1.loss=dist"], marks=pytest.mark.long),
        pytest.param(["precision=bfloat16", *CLASS], marks=pytest.mark.long),
        pytest.param([], marks=pytest.mark.long),
    ],
)
def test_pieces_give_the_whole_batchs_weights_and_curves_but_for_rounding(tmp_path, host, sets):
    whole, cut = (run(tmp_path / name, host, *sets, *more) for name, more in (("a", []), ("b", IN_FOUR)))
    half = {"rtol": 0.02, "atol": 0.005} if "precision=bfloat16" in sets else {}
    close(cut[1], whole[1], **half)
    assert not any(whole[1][name].equal(tensor) for name, tensor in cut[1].items())
    one, other = (result["stages"][-1]["members"]["student"]["curve"][-1] for result, _ in (whole, cut))
    assert list(one) == list(other)
    for name in one:
        assert other[name] == pytest.approx(one[name], rel=0.02 if half else 1e-3, abs=1e-3)


def test_losses_across_samples_take_one_more_forward_pass(tmp_path, host):
    plain, across = (run(tmp_path / str(n), host, *IN_FOUR, *sets)[0] for n, sets in enumerate(([], CLASS)))
    one, other = (result["stages"][-1]["flops"] for result in (plain, across))
    images = 1280 / 1295  # class statistics leave the ragged batch out
    assert other["student"] == pytest.approx(one["student"] * images * 4 / 3, rel=1e-2)
    assert other["teacher"] == pytest.approx(one["teacher"] * images, rel=1e-2)


@pytest.mark.parametrize("sets", [[], CLASS])
def test_a_plan_counts_every_pass_of_pieces(tmp_path, host, sets):
    made = make_run(tmp_path, recipe=RECIPE, host=host, sets=[*IN_FOUR, *sets, "train.epochs=1"])
    planned = [made.names.view.estimate(stage) for stage in autosize._stages(made.view)]
    assert [sum(stage["flops"].values()) for stage in made.execute()["stages"]] == planned


def test_buffers_that_a_model_puts_others_in_place_of_move_once_too(tmp_path, host):
    _, found = run(tmp_path, host, *IN_FOUR, *CLASS, "train.epochs=1", student="counting")
    assert {found["2.changed"].item(), found["2.replaced"].item()} == {1280 // 128 * 4}


def test_both_passes_see_the_same_masks_and_running_means_move_once(tmp_path, host, monkeypatch):
    """A mean over samples that says to be none takes two passes; it must end as by one."""
    told, one = run(tmp_path / "one", host, *IN_FOUR, student="normal")
    text = "student normal normalises by batches, which are 4 times smaller than data.batch_size says: train.accumulate"
    assert told["stages"][-1]["warnings"] == [text]
    monkeypatch.setattr("kdcore.losses.terms.KD.mean_over_batch", False, raising=False)
    close(run(tmp_path / "two", host, *IN_FOUR, student="normal")[1], one)


def test_a_loss_on_features_that_compares_samples_is_refused_before_a_teacher_is_trained(tmp_path, host):
    objective = [{"loss": "cross_entropy"}, {"loss": "sp"}]
    cnns = {"teacher": {"model": "cnn", "size": 1}, "student": {"model": "cnn", "size": 1}, "objective": objective}
    with pytest.raises(PlanError) as error:
        run(tmp_path, host, *IN_FOUR, "train.epochs=1", **cnns)
    said = (
        "objective: batches in pieces, but the samples of a batch are compared (loss 'sp' of student). "
        "Leave train.accumulate out, or take losses on logits alone."
    )
    assert str(error.value) == said
    assert not list(tmp_path.glob("store/results/*"))


def test_pieces_are_part_of_a_key_and_one_piece_is_not(tmp_path, host):
    stages = [made.keys.of(made.view.label_only("control", made.view.student)) for made in (
        make_run(tmp_path, host=host, sets=sets) for sets in ([], ["train.accumulate=1"], IN_FOUR))]  # fmt: skip
    assert stages[0] == stages[1] != stages[2]


def test_more_pieces_than_samples_and_pieces_of_a_teacher_alone_are_refused(tmp_path, host):
    with pytest.raises(PlanError, match=r", accumulate: a batch of 128 in 129 pieces. Use 1 to 128\."):
        run(tmp_path, host, "train.accumulate=129")
    with pytest.raises(RecipeError, match=r"It counts for every stage: write train.accumulate"):
        run(tmp_path, host, "train.teacher.accumulate=2")


@pytest.mark.parametrize(
    "more", [["precision=float16", "train.optimizer=lars", "train.lr=5.0"], pytest.param([], marks=pytest.mark.long)]
)
def test_a_killed_run_goes_on_bit_exact(tmp_path, host, more):
    """The student dies in its third epoch, in pieces, scaled, with the state of its optimizer."""
    recipe = {**RECIPE, "student": "normal", "execute": {"log_every": 5, "checkpoint_seconds": 0}}
    sets = [*IN_FOUR, *CLASS, "train.epochs=3", "train.teacher.epochs=1", *more]
    make_run(tmp_path / "whole", recipe=recipe, host=host, sets=sets).execute()
    die_at_step_30(make_run(tmp_path / "killed", recipe=recipe, host=host, sets=sets))
    make_run(tmp_path / "killed", recipe=recipe, host=host, sets=sets).execute()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
