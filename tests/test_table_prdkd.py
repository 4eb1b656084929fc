"""benchmarks/table_prdkd.py: recipes of pairs, runs that go on, a page of the runs alone, and the check of a table."""

from __future__ import annotations

import json
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest

from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import table_prdkd  # noqa: E402
from prdkd_facts import _grid, protocol_of  # noqa: E402
from prdkd_published import ABLATION, METHODS, PAPER, published  # noqa: E402
from prdkd_table import _chosen, by_seed, page  # noqa: E402

RECIPES = sorted((ROOT / "examples" / "cifar100").glob("*.toml"))
TINY = """
threads = 1
data = { name = "digits", batch_size = 256, drop_last = true }
teacher = { model = "mlp", size = 2, width = 16 }
student = { model = "mlp", size = 1 }
train = { epochs = 2, schedule = { name = "step", milestones = [1] }, teacher = { epochs = 3 } }
[strategy]
name = "variants"
grid_epochs = 1
[[strategy.variant]]
name = "kd"
objective = [{ loss = "cross_entropy" }, { loss = "kd" }]
grid = { "kd.weight" = [1.0, 4.0] }
[[strategy.variant]]
name = "dkd"
objective = [{ loss = "cross_entropy" }, { loss = "dkd" }]
[[strategy.variant]]
name = "dkd-class"
objective = [{ loss = "cross_entropy" }, { loss = "dkd", normalize = "class" }]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[str]]:
    """A table of a tiny pair, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "tiny.toml").write_text(TINY)
    arguments = ["--recipes", folder, "--pairs", "tiny", "--seeds", 2, "--name", "tiny", "--runs", folder / "runs"]
    arguments = [*map(str, arguments), "--out", str(folder / "out")]
    assert table_prdkd.main(arguments) == 0
    return folder, arguments


def content(folder: Path) -> dict:
    return json.loads((folder / "out" / "prdkd-tiny.json").read_text())


def test_the_page_says_what_the_run_says(made):
    folder, _ = made
    (run,) = content(folder)["runs"]
    (result,) = folder.glob("runs/run-*/result.json")
    rows = json.loads(result.read_text())["replicates"]
    for name in ("kd", "dkd", "dkd-class"):
        assert by_seed(run, name, "test") == {row["seed"]: 100 * row["test_accuracy_last"] for row in rows[name]}
        assert by_seed(run, name, "test_at_best") == {r["seed"]: 100 * r["test_accuracy_at_best"] for r in rows[name]}
    text = (folder / "out" / "prdkd-tiny.md").read_text()
    assert "## tiny: short budget: no verdict" in text
    assert run["tag"] in text
    assert "dkd-class less dkd" in text
    assert "The grid (monitor split, one seed, 1 of 2 epochs)" in text
    assert [row["point"] for row in run["grid"]] == [{"kd.weight": 1.0}, {"kd.weight": 4.0}]


def grid_of(points: list[dict], worths: list[float]) -> dict:
    return {"grid": [{"variant": "kd", "point": p, "monitor": w} for p, w in zip(points, worths, strict=True)]}


@pytest.mark.parametrize(
    ("best", "text"),
    [(1, "weight 4, normalize none"), (4, "weight 16, normalize instance (edge of the grid)")],
)
def test_a_chosen_point_at_an_edge_is_marked_and_may_hold_words(best, text):
    points = [{"kd.weight": w, "kd.normalize": n} for n in ("none", "instance") for w in (1.0, 4.0, 16.0)]
    points[4], points[5] = points[5], points[4]
    assert _chosen(grid_of(points, [float(i == best) for i in range(6)]), "kd") == text


def test_a_variant_with_the_name_of_a_point_does_not_stand_in_the_grid():
    def stage(name: str, worth: float) -> dict:
        return {"name": name, "members": {"kd-1": {"monitor_accuracy_last": worth}}}

    strategy = {"variant": [{"name": "kd", "grid": {"kd.weight": [1.0]}}, {"name": "kd-1"}]}
    result = {"stages": [stage("a (grid)", 0.1), stage("a (seed 0)", 0.9)], "recipe": {"strategy": strategy}}
    assert [row["monitor"] for row in _grid(result)] == [0.1]


def test_other_sizes_of_models_are_another_protocol(made):
    folder, _ = made
    (path,) = folder.glob("runs/run-*/result.json")
    result = json.loads(path.read_text())
    larger = {**result["recipe"]["teacher"], "size": 3}
    assert protocol_of({**result, "recipe": {**result["recipe"], "teacher": larger}}) != protocol_of(result)


def test_the_same_command_goes_on_and_writes_the_same_figures(made):
    folder, arguments = made
    before = content(folder)
    assert table_prdkd.main(arguments) == 0
    after = content(folder)
    assert after["runs"][0]["students"] == before["runs"][0]["students"]
    assert after["commands"] == before["commands"]


def test_a_budget_that_is_over_ends_the_run_and_the_next_command_goes_on(made, tmp_path):
    folder, arguments = made
    here = [text.replace(str(folder / "runs"), str(tmp_path / "runs")) for text in arguments]
    here[here.index("--out") + 1] = str(tmp_path / "out")
    assert table_prdkd.main([*here, "--budget-minutes", "0"]) == 3
    assert not (tmp_path / "out").exists()
    assert table_prdkd.main(here) == 0
    assert [row["test"] for row in content(tmp_path)["runs"][0]["students"]] == [
        row["test"] for row in content(folder)["runs"][0]["students"]
    ]


def test_the_check_finds_an_edited_figure_and_an_edited_page(made, capsys, tmp_path):
    folder, arguments = made
    assert table_prdkd.main([*arguments, "--check"]) == 0
    table = content(folder)
    table["runs"][0]["students"][0]["test"] += 0.01
    (tmp_path / "prdkd-tiny.json").write_text(json.dumps(table))
    (tmp_path / "prdkd-tiny.md").write_text(page(table))
    edited = [*arguments[:-1], str(tmp_path), "--check"]
    capsys.readouterr()
    assert table_prdkd.main(edited) == 1
    assert "students.0.test" in capsys.readouterr().out
    (tmp_path / "prdkd-tiny.json").write_text(json.dumps(content(folder)))
    assert table_prdkd.main(edited) == 1
    assert "is not what prdkd-tiny.json gives" in capsys.readouterr().out


def options(**changes) -> Namespace:
    plain = table_prdkd._parser().parse_args([])
    return Namespace(**{**vars(plain), **changes})


def test_epochs_change_all_lengths_in_proportion():
    recipe = table_prdkd.recipe_of("resnet56-resnet20", options(epochs=27))
    assert recipe["train"]["epochs"] == 27
    assert recipe["train"]["schedule"]["milestones"] == [15, 18, 21, 24]
    assert recipe["train"]["teacher"]["epochs"] == 24
    assert recipe["train"]["teacher"]["schedule"]["milestones"] == [15, 18, 21]
    warmed = {v["name"]: v["objective"][1].get("warmup_epochs") for v in recipe["strategy"]["variant"]}
    assert (warmed["dkd"], warmed["reviewkd"], warmed["kd"]) == (2.0, 2.0, None)
    short = table_prdkd.recipe_of("short", options(epochs=30))
    assert (short["train"]["warmup_epochs"], short["strategy"]["grid_epochs"]) == (2.0, 4)


def test_the_fields_settings_are_those_of_published_runs():
    recipe = table_prdkd.recipe_of("vgg13-vgg8", options(settings="field", methods=["dkd", "dkd-class"]))
    assert (recipe["data"]["batch_size"], recipe["train"]["epochs"]) == (64, 240)
    plain, normalised = (variant["objective"][1] for variant in recipe["strategy"]["variant"])
    assert (plain["beta"], normalised["beta"]) == (6.0, 8.0)


def test_an_unknown_method_is_named(capsys, made):
    _, arguments = made
    with pytest.raises(Exception, match=r"no method 'dkdd'.*Did you mean 'dkd'"):
        table_prdkd.main([*arguments, "--methods", "dkdd"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_compiles_and_names_its_own_path(path):
    view, strategy = compile_recipe(load(path), load_plugins().catalog)
    for variant in strategy.options["variant"]:
        assert view.terms(variant["objective"])
    assert f"examples/cifar100/{path.name}" in path.read_text()


def test_there_is_a_recipe_with_all_methods_for_each_published_pair():
    for pair in PAPER:
        recipe = tomllib.loads((ROOT / "examples" / "cifar100" / f"{pair}.toml").read_text())
        assert tuple(variant["name"] for variant in recipe["strategy"]["variant"]) == METHODS
        assert (recipe["data"]["batch_size"], recipe["train"]["epochs"]) == (256, 270)
    ablation = tomllib.loads((ROOT / "examples" / "cifar100" / "ablation.toml").read_text())
    assert [variant["name"] for variant in ablation["strategy"]["variant"]] == list(ABLATION)


def test_the_ablation_is_the_pair_of_its_table():
    same = {method: published("resnet110-resnet32", method) for method in ("kd", "dkd", "dkd-class")}
    assert same == {method: ABLATION[method] for method in same}
