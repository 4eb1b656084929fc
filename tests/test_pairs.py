"""Every method of the published tables runs by its name from a recipe of its pair, on small synthetic images."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

import kdcore
from kdcore.overrides import read

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from prdkd_published import METHODS, PAPER  # noqa: E402

SMALL = {"resnet56-resnet20": ("cifar_resnet8", None), "wrn_40_2-shufflenetv1": ("cifar_wrn_16_1", None)}
"""Pairs that `make test` runs, with a teacher that is less deep; the others are long tests."""


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    """A member's latency is no promise here; taking it 30 times of 20 members costs a third of these tests."""
    monkeypatch.setattr("kdcore.training.cost.LATENCY_RUNS", 1)


def shortened(pair: str) -> dict:
    """The pair's recipe for one epoch of two steps on 16 x 16 images; of CRD's negatives there are fewer."""
    recipe = read(ROOT / "examples" / "cifar100" / f"{pair}.toml")
    # a deep teacher of two steps has features of 10,000 and more, which no student follows in two
    recipe["train"] |= {"epochs": 1, "clip": 1.0, "teacher": {"epochs": 1}}
    recipe["data"] = {"name": "synthetic", "samples": 40, "test_samples": 20, "classes": 5, "batch_size": 16}
    recipe["strategy"] |= {"seeds": 1}
    recipe["threads"] = 1
    if pair in SMALL:
        recipe["teacher"] = {"model": SMALL[pair][0]}
    return recipe


@pytest.mark.parametrize(
    "pair", [pair if pair in SMALL else pytest.param(pair, marks=pytest.mark.long) for pair in PAPER]
)
def test_all_methods_of_a_pair_are_trained(pair, tmp_path):
    result = kdcore.run(shortened(pair), root=tmp_path, quiet=True)
    (stage,) = [stage for stage in result["stages"] if "kd" in stage["members"]]
    assert set(result["replicates"]) == set(METHODS)
    for name in METHODS:
        (row,) = stage["members"][name]["curve"]
        assert math.isfinite(row["train.loss"])
        assert sum(key.startswith("train.") for key in row) == 3  # cross-entropy, the method's term and their sum


def test_the_methods_of_the_imagenet_table_run_on_torchvisions_pair(tmp_path):
    recipe = shortened("resnet56-resnet20")
    recipe["teacher"], recipe["student"] = {"model": "resnet34"}, {"model": "resnet18"}
    named = {variant["name"]: variant for variant in recipe["strategy"]["variant"]}
    at = {"name": "at", "objective": [{"loss": "cross_entropy"}, {"loss": "at", "weight": 1000.0}]}
    variants = [at, *(named[name] for name in ("ofd", "crd", "reviewkd", "kd", "dkd", "dkd-class"))]
    recipe["strategy"] |= {"variant": variants}
    result = kdcore.run(recipe, root=tmp_path, quiet=True)
    assert set(result["replicates"]) == {variant["name"] for variant in variants}
