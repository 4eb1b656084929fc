"""Recipes for large batches: the learning rate's scaling, the moving average, cutout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import make_run
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdcore.data import Random
from kdcore.data.augment import cutout
from kdcore.data.options import CutoutOptions
from kdcore.errors import RecipeError
from kdcore.training.ema import Average

# ---------------------------------------------------------------- the learning rate


@pytest.mark.parametrize(("scaling", "factor"), [([], 4.0), (["train.lr_scaling=sqrt"], 2.0)])
def test_the_rate_grows_with_the_batch_in_keys_and_curves(tmp_path, host, scaling, factor):
    sets = ["train.lr=0.01", "train.schedule=constant", "data.batch_size=128", "train.epochs=1"]
    scaled = make_run(tmp_path, host=host, sets=[*sets, "train.lr_batch=32", *scaling])
    stated = make_run(tmp_path, host=host, sets=[*sets, f"train.lr={0.01 * factor}"], name="stated")
    assert scaled.view.optimizer.lr.value == scaled.view.teacher_optimizer.lr.value == 0.01 * factor
    one, other = scaled.execute(), stated.execute()
    assert one["student"]["stage"] == other["student"]["stage"]
    assert one["stages"][-1]["members"]["student"]["curve"][0]["lr"] == 0.01 * factor


def test_a_teacher_may_have_a_batch_of_its_own_to_scale_from(tmp_path, host):
    view = make_run(tmp_path, host=host, sets=["train.lr=0.01", "train.lr_batch=32", "train.teacher.lr_batch=64"]).view
    assert (view.optimizer.lr.value, view.teacher_optimizer.lr.value) == (0.04, 0.02)


def test_a_rate_that_is_not_scaled_keeps_its_key(tmp_path, host):
    plain, same = (make_run(tmp_path, host=host, sets=s) for s in ([], ["train.lr_batch=128"]))
    stages = [made.view.label_only("control", made.view.student) for made in (plain, same)]
    assert plain.keys.of(stages[0]) == same.keys.of(stages[1])


def test_a_scaling_without_a_batch_to_scale_from_is_refused(tmp_path, host):
    with pytest.raises(RecipeError, match=r"^train.lr_scaling: there is no lr_batch to scale from"):
        make_run(tmp_path, host=host, sets=["train.lr_scaling=linear"])


# ---------------------------------------------------------------- the moving average


def test_the_student_is_averaged_in_every_strategy_and_the_teacher_if_asked(tmp_path, host):
    view = make_run(tmp_path, host=host, sets=["train.ema=0.9"]).view
    teacher = view.label_only("teacher", view.teacher)
    assert view.distilled(view.student, teacher["teacher"]).members["student"].decay == 0.9
    assert view.label_only("control", view.student).members["control"].decay == 0.9
    assert teacher.members["teacher"].decay is None
    both = make_run(tmp_path, host=host, sets=["train.ema=0.9", "train.teacher.ema=0.5"]).view
    assert both.label_only("teacher", both.teacher).members["teacher"].decay == 0.5


class Counting(nn.Module):
    """Parameters of two dtypes, averaged buffers, and whole numbers that have no average."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))


def moving(module, average):
    """Five updates, each after a change of all that a module has."""
    draw = torch.Generator().manual_seed(0)
    for step in range(5):
        with torch.no_grad():
            for tensor in module.state_dict().values():
                fresh = torch.randn(tensor.shape, generator=draw)
                tensor.copy_(fresh > 0 if tensor.dtype == torch.bool else 100 * fresh + step)
        average(module)


def test_the_average_is_torchs_to_the_bit_but_for_whole_numbers_which_are_the_modules():
    module = Counting()
    own, torchs = Average(module, 0.9), AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    moving(module, own.update)
    moving(module, torchs.update_parameters)
    found, expected, now = own.state_dict(), torchs.state_dict(), module.state_dict()
    assert list(found) == list(expected), "checkpoints stay readable"
    for name, tensor in found.items():
        whole = not tensor.is_floating_point() and name != "n_averaged"
        assert tensor.equal(now[name.removeprefix("module.")] if whole else expected[name]), name
    again = Average(Counting(), 0.9)
    again.load_state_dict(expected)
    assert again.n_averaged == 5


def test_the_average_is_what_is_delivered(tmp_path, host):
    """One step an epoch, two epochs: the average is 0.75 of the first weights and 0.25 of the second."""
    sets = ["data.batch_size=2000", "train.schedule=constant", "train.teacher.epochs=1"]
    made = {
        name: make_run(tmp_path / name, host=host, sets=[*sets, *more])
        for name, more in (("first", ["train.epochs=1"]), ("second", []), ("average", ["train.ema=0.75"]))
    }
    for run in made.values():
        run.execute()
    first, second, average = (load_file(run.folder / "student.safetensors") for run in made.values())
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- cutout


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), size=st.integers(1, 12), seed=st.integers(0, 2**31),
    samples=st.integers(1, 5),
)  # fmt: skip
def test_cutout_clears_a_square_around_a_pixel_of_the_image(height, width, size, seed, samples):
    random = Random(seed, torch.arange(samples), 0)
    images = torch.ones(samples, 2, height, width)
    found = cutout(images, random, CutoutOptions(size=size))
    for n in range(samples):
        assert found[n, 0].equal(found[n, 1])
        y, x = (int(random.integers(f"cutout.{a}", 0, length)[n]) for a, length in (("y", height), ("x", width)))
        top, left = y - size // 2, x - size // 2
        for row in range(height):
            for column in range(width):
                inside = top <= row < top + size and left <= column < left + size
                assert found[n, 0, row, column] == (0 if inside else 1)
    assert images.eq(1).all()


def test_every_centre_is_as_likely():
    images = torch.ones(4000, 1, 4, 4)
    holes = cutout(images, Random(0, torch.arange(4000), 0), CutoutOptions(size=1)).eq(0).sum(0)
    assert holes.sub(250).abs().max() < 5 * math.sqrt(250)


def test_cutout_is_a_transform_of_a_recipe(tmp_path, host):
    sets = ["data.transforms=[{name='cutout', size=3}]", "train.epochs=1"]
    made = make_run(tmp_path, host=host, sets=sets)
    assert made.execute()["student"]["monitor_accuracy"] > 0.3
