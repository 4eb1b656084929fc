"""Training images on the device or on the host: the choice, and the same batches in the same order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_table import REQUIRED
from hypothesis import given
from hypothesis import strategies as st
from small import RECIPE, make_run, weights

from kdcore.data import SourceContext
from kdcore.data.residency import fits
from kdcore.data.source import EpochSource
from kdcore.executor import DataCache
from kdcore.options import Options
from kdcore.plan import SourceSpec, Spec
from kdcore.training import device

IMAGES = 1295 * 64  # bytes of digits' training split


@pytest.fixture(scope="module")
def context(host):
    splits = DataCache(host.catalog)(SourceSpec(Spec("core/digits")))
    return SourceContext(splits.for_training, 0, 100, False, (), torch.device("cpu"))


def test_half_of_the_free_memory_is_the_bound():
    images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
    assert [fits(images, free) for free in (None, 1280, 1279)] == [True, True, False]


@given(steps=st.lists(st.integers(0, 40), max_size=12))
def test_batches_from_the_host_are_those_of_the_device_in_any_order(context, steps):
    resident = EpochSource(Options(), context)
    host = EpochSource(Options(), replace(context, resident=False))
    for step in [*steps, 12, 13, 14]:  # into the next epoch too
        one, other = resident.batch(step), host.batch(step)
        assert one.inputs.equal(other.inputs)
        assert one.target.equal(other.target)
        assert one.index.equal(other.index)
        assert one.epoch == other.epoch
    index = torch.tensor([5, 2, 9])
    one, other = (next(source.walk([index], 1)).inputs for source in (resident, host))
    assert one.equal(other)


@pytest.mark.parametrize("sets", [["data.shift=1"], pytest.param(["cache.views=1"], marks=pytest.mark.long)])
def test_a_run_from_the_host_has_the_same_bits_and_says_where_its_images_are(tmp_path, host, monkeypatch, sets):
    told = {}
    for name, free in (("device", 2 * IMAGES), ("host", 2 * IMAGES - 1)):
        monkeypatch.setattr(device, "free_memory", lambda place, free=free: free)
        made = make_run(tmp_path / name, recipe=RECIPE, host=host, sets=[*sets, "train.epochs=1"])
        places = {stage["environment"]["images"] for stage in made.execute()["stages"]}
        assert places == {name}
        told[name] = [event["text"] for event in made.console.kinds("note")]
    assert weights(tmp_path / "device") == weights(tmp_path / "host")
    said = "training images (0.0 GiB) are more than half of the free memory: they stay on the host"
    assert said in told["host"]
    assert said not in told["device"]


@pytest.mark.gpu
@pytest.mark.skipif(not REQUIRED and not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_is_fed_from_the_host_with_the_same_bits(tmp_path, host, monkeypatch):
    recipe = {**RECIPE, "device": "cuda"}
    make_run(tmp_path / "device", recipe=recipe, host=host).execute()
    monkeypatch.setattr(device, "free_memory", lambda place: 0)
    stage = make_run(tmp_path / "host", recipe=recipe, host=host).execute()["stages"][-1]
    assert stage["environment"]["images"] == "host"
    assert weights(tmp_path / "device") == weights(tmp_path / "host")
