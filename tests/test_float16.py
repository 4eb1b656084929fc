"""precision = "float16": scaled losses, skipped updates, and a resume that knows both."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from small import RECIPE, die_at_step_30, make_run, weights

from kdcore.errors import NumericError
from kdcore.plugins import load_plugins
from kdcore.training.scaling import ENDLESS

HALF = {**RECIPE, "precision": "float16"}
STEEP = """
import kdcore
import torch

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("steep", Steep)

class Steep(torch.nn.Module):
    '''Small, with a slope that float16 cannot hold at a scale above its inverse.'''
    needs = frozenset({"logits"})

    class Options(kdcore.Options):
        slope: float = 1.0
        value: float = 0.0

    @classmethod
    def build(cls, shapes, options):
        made = cls()
        made.options = options
        return made

    def forward(self, student, teacher, batch):
        x = student.logits.float().mean()
        return self.options.value + self.options.slope * (x - x.detach())
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugin") / "steep.py"
    file.write_text(STEEP)
    return load_plugins(files=[file])


def curve(result, member="student"):
    return result["stages"][-1]["members"][member]["curve"]


def steep(slope, **options):
    return [{"loss": "cross_entropy"}, {"loss": "steep", "slope": slope, **options}]


def test_float16_learns_what_float32_learns(tmp_path, host):
    half, whole = (
        make_run(tmp_path, recipe=recipe, host=host, name=name, sets=["train.clip=1.0"]).execute()
        for recipe, name in ((HALF, "half"), (RECIPE, "whole"))
    )
    assert half["student"]["monitor_accuracy"] == pytest.approx(whole["student"]["monitor_accuracy"], abs=0.03)
    assert half["student"]["stage"] != whole["student"]["stage"]
    assert {"skipped", "scale"} == set(curve(half)[0]) - set(curve(whole)[0])
    one, other = (load_file(tmp_path / name / "student.safetensors") for name in ("half", "whole"))
    for name, tensor in one.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, other[name], rtol=0.02, atol=0.02)


@pytest.mark.long
def test_clipping_sees_gradients_as_they_are(tmp_path, host):
    """A bound above every norm changes nothing; gradients that are still scaled would all be above it."""
    loose = make_run(tmp_path, recipe=HALF, host=host, name="loose", sets=["train.clip=1e4"]).execute()
    free = make_run(tmp_path, recipe=HALF, host=host, name="free").execute()
    assert loose["student"]["stage"] != free["student"]["stage"]
    one, other = (load_file(tmp_path / name / "student.safetensors") for name in ("loose", "free"))
    assert all(one[name].equal(other[name]) for name in one)


def test_updates_that_overflow_are_skipped_counted_and_recorded(tmp_path, host):
    """Each halves the scale, which begins at 2^16; at last it fits."""
    recipe = {**HALF, "objective": steep(5e5)}
    rows = curve(make_run(tmp_path, recipe=recipe, host=host, sets=["train.lr=1e-8", "train.epochs=3"]).execute())
    assert rows[-1]["skipped"] == 0
    assert rows[0]["skipped"] == 11  # every step of the first epoch
    assert sum(row["skipped"] for row in rows) == 16 - math.log2(rows[-1]["scale"])


def test_an_endless_row_of_skipped_updates_ends_the_stage_and_says_what_to_do(tmp_path, host):
    made = make_run(tmp_path, recipe={**HALF, "objective": steep(1e38)}, host=host, sets=["train.epochs=4"])
    with pytest.raises(NumericError) as error:
        made.execute()
    assert f"{ENDLESS} updates in a row were skipped: gradients are not finite, down to a scale of" in str(error.value)
    assert error.value.where == f"stage 'mlp-2 -> mlp-1', step {ENDLESS - 1}, member 'student'"
    assert error.value.fix == 'Lower train.lr, or write precision = "bfloat16".'


def test_a_loss_that_is_not_finite_itself_is_no_matter_of_scale(tmp_path, host):
    recipe = {**HALF, "objective": [{"loss": "steep", "value": 1e38, "weight": 1e10}]}
    with pytest.raises(NumericError, match="loss is inf"):
        make_run(tmp_path, recipe=recipe, host=host).execute()


@pytest.mark.long  # test_accumulate has a shorter one
@pytest.mark.parametrize("slope", [1.0, 5e6])
def test_a_killed_run_goes_on_bit_exact(tmp_path, host, slope):
    """With a checkpoint every epoch; in the first, updates are skipped."""
    recipe = {**HALF, "objective": steep(slope), "execute": {"log_every": 5, "checkpoint_seconds": 0}}
    sets = ["train.epochs=4", "train.ema=0.9", f"train.lr={0.05 / slope}"]
    whole = make_run(tmp_path / "whole", recipe=recipe, host=host, sets=sets).execute()
    die_at_step_30(make_run(tmp_path / "killed", recipe=recipe, host=host, sets=sets))
    killed = make_run(tmp_path / "killed", recipe=recipe, host=host, sets=sets).execute()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert curve(killed) == curve(whole)
