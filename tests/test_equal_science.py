"""benchmarks/equal_science.py: what it holds equal between the ways, and what its page says of made-up runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdcore.errors import NumericError
from kdcore.losses import dkd_loss
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load
from kdcore.training.schedules import compile_schedule

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import equal_science
from competitors import textbook
from equal_science import BATCHES, VIEWS, base, recipes, weight_of
from science_page import page, verdict
from tables import Spread, unpaired
from textbook_loop import objective, rate


@pytest.fixture(scope="module")
def catalog():
    return load_plugins().catalog


@pytest.fixture(scope="module")
def options():
    return equal_science._parser().parse_args(["--epochs", "5"])


@pytest.fixture(scope="module")
def made(options):
    """Recipe of every run by name, but for the teacher's weights, which no test has."""
    found = dict(recipes(options, Path("teacher.safetensors")))
    assert all(recipe["teacher"].pop("weights") == "teacher.safetensors" for recipe in found.values())
    return found


def test_the_textbook_has_the_rate_of_every_step_that_kdcore_has(options, catalog):
    recipe, steps = base(options), 7
    view, _ = compile_recipe(load(recipe), catalog)
    factor = compile_schedule(view.optimizer.lr, catalog, view.epochs)
    for step in range(steps * view.epochs):
        ours = view.optimizer.lr.value * factor(step / steps, (step + 1) / steps)
        assert rate(step, steps, recipe["train"]) == pytest.approx(ours, rel=1e-12)


def test_the_textbook_has_the_objective_of_the_recipe():
    torch.manual_seed(0)
    weight, labels = weight_of("dkd"), torch.randint(100, (32,))
    student, teacher = torch.randn(2, 32, 100)
    ours = dkd_loss(student, teacher, labels, kd_weight=weight, ce_weight=1.0)
    assert textbook(student, teacher, labels, objective(weight)).item() == pytest.approx(ours.item(), rel=1e-5)


def test_ways_differ_in_the_cache_alone(made):
    ways = {name: dict(recipe) for name, recipe in made.items() if not name.startswith("batch")}
    caches = [recipe.pop("cache", None) for recipe in ways.values()]
    assert caches == [None, *({"views": views} for views in VIEWS)]
    assert all(recipe == ways["live"] for recipe in ways.values())


def test_rates_grow_with_the_batch(made, catalog):
    rates = {}
    for batch in BATCHES:
        view, _ = compile_recipe(load(made[f"batch {batch}"]), catalog)
        rates[view.data.batch_size] = view.optimizer.lr.value
    assert rates == pytest.approx({64: 0.05, 256: 0.2, 1024: 0.8, 4096: 3.2})


@pytest.mark.parametrize(
    ("ours", "wanted"),  # of scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    [([54.1, 53.7, 54.4], (-1.9423719682, 2.6757053016)), ([50.0, 50.0, 50.0, 51.0], (-5.6667156758, -1.2332843242))],
)
def test_an_unpaired_interval_is_welchs(ours, wanted):
    found = unpaired(ours, [53.0, 54.9, 53.2])
    assert (found.low, found.high) == pytest.approx(wanted)


def test_samples_without_a_spread_have_no_interval_to_guess():
    assert unpaired([], [1.0]) is None
    assert unpaired([2.0], [1.0, 1.0]).low is None
    assert (unpaired([2.0, 2.0], [1.0, 1.0]).low, unpaired([2.0, 2.0], [1.0, 1.0]).high) == (1.0, 1.0)


# ---------------------------------------------------------------- the page


def rows(variant: str, *accuracies: float) -> list[dict]:
    return [
        {"variant": variant, "seed": seed, "test": value, "test_at_best": value}
        for seed, value in enumerate(accuracies)
    ]


def run_of(name: str, students: list[dict], cache: dict | None, recipe: dict) -> dict:
    protocol = {
        "models": ["big", "small"], "images": {"train": 45_000, "monitor": 5_000, "test": 10_000}, "seeds": [0, 1, 2],
        "data": {**recipe["data"], "split_seed": 0}, "train": {**recipe["train"], "schedule": {"name": "cosine"}},
        "strategy": recipe["strategy"],
    }  # fmt: skip
    about = dict.fromkeys(("processor", "machine", "device", "threads"), "x")
    versions = dict.fromkeys(("kdcore", "torch", "torchvision", "python"), "1")
    return {
        "name": name, "protocol": protocol, "cache": cache, "students": students, "finished": "2026-01-01T00:00:00Z",
        "environment": about, "versions": versions,
    }  # fmt: skip


def test_the_page_says_which_ways_are_as_accurate_and_what_class_normalisation_gains(made):
    ways = {"live": (0.52, 0.54, 0.53), "views 1": (0.41, 0.42, 0.43), "views 16": (0.53, 0.54, 0.52)}
    runs = [run_of(name, rows("dkd", *values), made[name].get("cache"), made[name]) for name, values in ways.items()]
    students = rows("dkd", 0.5, 0.5, 0.5) + rows("dkd-class", 0.51, 0.52, 0.53)
    runs.append(run_of("batch 256", students, {"views": 4}, made["batch 256"]))
    content = {
        "commands": ["python x"], "commit": "abc", "failed": {"batch 4096": "weights are not finite"}, "runs": runs,
        "teacher": {"test": 0.63, "epochs": 24}, "textbook": rows("dkd", 0.53, 0.52, 0.53),
    }  # fmt: skip
    text = page(content)
    assert "named before" in text
    row = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines()}
    assert row["live"][4:6] == ["undecided", "yes"]  # an interval of 2 points, about a third of one
    assert row["views 1"][4:6] == ["worse", "no"]
    assert row["views 16"][4:6] == ["undecided", "yes"]
    assert "## Ways, at batch 128" in text
    assert "views 16: of 5 epochs each has a view of its own" in text
    assert "views 1: of" not in text
    assert "| views 1 | 42.00 ± 1.00 | 42.00 ± 1.00 | -10.67 [" in text
    assert "| 256 | 0.2 | 875 | 50.00 ± 0.00 | 52.00 ± 1.00 | +2.00 [-0.48, +4.48] |" in text
    assert "batch 4096 ended: weights are not finite" in text


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (-0.9, 0.8, "within the margin"), (-0.9, -0.1, "within the margin"), (-1.5, -0.3, "worse"),
        (-3.0, -2.0, "worse"), (-1.5, 0.4, "undecided"), (-0.5, 1.2, "undecided"), (None, None, "undecided"),
    ],
)  # fmt: skip
def test_a_verdict_is_of_the_whole_interval(low, high, wanted):
    assert verdict(Spread(0.0, 6, None, low, high)) == wanted


def test_a_table_has_what_its_call_made_and_nothing_of_calls_before(tmp_path, monkeypatch):
    options = equal_science._parser().parse_args(["--runs", str(tmp_path), "--out", str(tmp_path)])
    ended, books = {"batch 4096"}, []

    def run(recipe, **_):
        name = recipe.pop("name", "teacher")
        if name in ended:
            raise NumericError("weights are not finite")
        return SimpleNamespace(folder=tmp_path / f"run-{name}")

    monkeypatch.setattr(equal_science.kdcore, "run", run)
    monkeypatch.setattr(
        equal_science, "recipes", lambda *_: [(name, {"name": name}) for name in ("live", "batch 4096")]
    )
    monkeypatch.setattr(equal_science, "_write", lambda options, book: books.append(book))
    equal_science.train(options, "first")
    assert books[-1]["runs"] == {"run-live": "live"}
    assert books[-1]["failed"].keys() == {"batch 4096"}
    ended.clear()
    equal_science.train(options, "second")
    assert books[-1]["failed"] == {}
    assert books[-1]["commands"] == ["second"]


def test_the_page_of_a_comparison_that_has_just_begun_has_what_is_there():
    content = {"commands": ["x"], "commit": "abc", "failed": {}, "runs": [], "textbook": []}
    assert "63.00 (last of 24 epochs)" in page(content | {"teacher": {"test": 0.63, "epochs": 24}})
