"""Comparing finished runs: paired by seed, with honest intervals, and never across protocols unless asked to."""

from __future__ import annotations

import copy
import json
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from kdcore.cli.compare import chains_table
from kdcore.compare import check_finding, compare
from kdcore.errors import RecipeError, StorageError
from kdcore.report.tables import replicates

RECIPE = {
    "seed": 0,
    "data": {"name": "digits", "monitor": 0.1},
    "objective": [{"loss": "cross_entropy"}, {"loss": "kd", "temperature": 4.0}],
    "train": {"epochs": 2},
    "execute": {"jobs": 1},
}
PROTOCOL = {
    "selection": "last", "train_images": 1000, "monitor_images": 100, "test_images": 360, "split_seed": 0,
    "fingerprint": "f" * 64, "text": "...",
}  # fmt: skip


def recipe_with(temperature, **more):
    recipe = copy.deepcopy({**RECIPE, **more})
    recipe["objective"][1]["temperature"] = temperature
    return recipe


def result(seed=0, test=0.9, *, recipe=RECIPE, monitor=0.91, stage="", replicates=None, stages=None, **protocol):
    """A made-up result.json."""
    key = stage or f"{seed} {test} {json.dumps(recipe['objective'])}"
    return {
        "run": {"seed": seed, "id": "run"},
        "protocol": {**PROTOCOL, **protocol},
        "student": row(key, test, monitor),
        "replicates": replicates or {},
        "stages": stages or [trained(key)],
        "recipe": {**recipe, "seed": seed},
    }


def row(stage, test, monitor=0.91, **more):
    return {"model": "mlp-1", "test_accuracy": test, "monitor_accuracy": monitor, "stage": stage, "member": "student",
            "params": 1, **more}  # fmt: skip


def trained(key, teacher="", seconds=2.0, flops=10**12, controllers=()):
    member = "teacher" if teacher.startswith("t") else "student"
    inputs = {"teacher": {"stage": teacher, "member": member}} if teacher else {}
    flops = {"student": flops, "teacher": flops}
    members = {"student": {"model": "mlp-1", "trained": True}, "teacher": {"model": "mlp-2", "trained": not teacher}}
    return {"key": key, "seconds": seconds, "flops": flops, "inputs": inputs, "uses": {}, "controllers": controllers,
            "members": members, "seed": 0}  # fmt: skip


def compared(*results, **options):
    findings = {f"run{i}": check_finding(one, "result.json") for i, one in enumerate(results)}
    return compare(findings, **options)


def pair(ours, theirs):
    """Runs of two recipes, whose seeds are 0, 1, 2, ..."""
    return [
        *(result(seed, test, recipe=recipe_with(4.0)) for seed, test in enumerate(theirs)),
        *(result(seed, test, recipe=recipe_with(2.0)) for seed, test in enumerate(ours)),
    ]


SHARES = st.floats(0, 1, allow_nan=False)
PAIRS = st.lists(st.tuples(SHARES, SHARES), min_size=2, max_size=8)


# ---------------------------------------------------------------- the interval


@given(PAIRS)
def test_the_interval_is_student_s_t_of_the_paired_differences(pairs):
    ours, theirs = zip(*pairs, strict=True)
    differences = [a - b for a, b in pairs]
    assume(max(differences) - min(differences) > 1e-3)
    found = compared(*pair(ours, theirs)).gaps[1]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean == pytest.approx(sum(differences) / len(pairs), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-12)


@given(PAIRS)
def test_swapping_the_variants_turns_the_differences_around(pairs):
    ours, theirs = zip(*pairs, strict=True)
    results = pair(ours, theirs)
    there, back = compared(*results).gaps[1], compared(*reversed(results)).gaps[1]
    assert (there.mean, there.low, there.high) == (-back.mean, -back.high, -back.low)


@given(PAIRS, st.randoms())
def test_the_order_of_runs_decides_nothing_but_which_variant_is_the_first(pairs, random):
    ours, theirs = zip(*pairs, strict=True)
    first, *others = results = pair(ours, theirs)
    random.shuffle(others)
    there, shuffled = compared(*results), compared(first, *others)
    assert there.gaps == shuffled.gaps
    assert [v.samples for v in there.variants] == [v.samples for v in shuffled.variants]


def test_one_pair_has_a_difference_and_no_interval():
    found = compared(*pair([0.95], [0.9])).gaps[1]
    assert found.mean == pytest.approx(0.05)
    assert (found.low, found.high) == (None, None)


def test_seeds_without_a_partner_are_named_and_do_not_count():
    results = [result(seed, 0.9, recipe=recipe_with(4.0)) for seed in (0, 1, 7)]
    results += [result(seed, 0.8 + seed / 10, recipe=recipe_with(2.0)) for seed in (0, 1, 2, 3)]
    found = compared(*results).gaps[1]
    assert (found.seeds, found.unpaired, found.missing) == ((0, 1), (2, 3), (7,))
    assert found.mean == pytest.approx(-0.05)


def test_variants_that_share_no_seed_have_no_difference():
    results = [result(0, recipe=recipe_with(4.0)), result(1, recipe=recipe_with(2.0))]
    assert compared(*results).gaps[1].mean is None


# ---------------------------------------------------------------- what a variant is


def test_runs_of_one_recipe_are_one_variant_wherever_they_ran():
    recipes = [RECIPE, {**RECIPE, "execute": {"jobs": 4}}]
    (variant,) = compared(*(result(seed, recipe=recipe) for seed, recipe in enumerate(recipes))).variants
    assert [sample.seed for sample in variant.samples] == [0, 1]


def test_what_differs_between_recipes_is_named_by_the_path_that_set_takes():
    longer = {**recipe_with(2.0), "train": {"epochs": 3, "lr": 0.1}}
    found = compared(result(recipe=recipe_with(4.0)), result(1, recipe=longer)).variants
    assert [variant.settings for variant in found] == [
        {"objective.1.temperature": 4.0, "train.epochs": 2, "train.lr": None},
        {"objective.1.temperature": 2.0, "train.epochs": 3, "train.lr": 0.1},
    ]


def test_a_table_that_only_one_recipe_fills_is_named_by_its_keys_alone():
    budgets = [{"tflops": 5.0}, {}, None]
    recipes = [{**RECIPE, "strategy": {"budget": budget} if budget is not None else {}} for budget in budgets]
    found = compared(*(result(seed, recipe=recipe) for seed, recipe in enumerate(recipes))).variants
    assert [variant.settings for variant in found] == [{"strategy.budget.tflops": x} for x in (5.0, None, None)]
    empty = compared(*(result(seed, recipe=recipe) for seed, recipe in enumerate(recipes[1:]))).variants
    assert [variant.settings for variant in empty] == [{"strategy.budget": x} for x in ({}, None)]


def test_where_a_machine_has_its_data_makes_no_variant():
    here, there = ({**RECIPE, "data": {**RECIPE["data"], "root": root}} for root in ("/here", "/there"))
    assert len(compared(result(recipe=here), result(1, recipe=there)).variants) == 1
    other = compared(result(recipe=here), result(1, recipe={**there, "train": {"epochs": 9}})).variants
    assert [variant.settings for variant in other] == [{"train.epochs": 2}, {"train.epochs": 9}]


def test_a_run_with_replicates_counts_as_so_many_seeds():
    rows = {"4-2": [row(f"a{s}", 0.9 + s / 100, seed=s) for s in range(3)], "4-3-2": [row("b", 0.1, seed=0)]}
    (variant,) = compared(result(replicates=rows), result(5, 0.5)).variants
    assert [(s.seed, s.test) for s in variant.samples] == [(0, 0.9), (1, 0.91), (2, 0.92), (5, 0.5)]


def searched(**more):
    stages = [trained("t"), trained("direct", "t"), trained("assistant", "t"), trained("long", "assistant")]
    rows = {"4-3-2": [row("long", 0.95, seed=0)], "4-2": [row("direct", 0.9, seed=0)]}
    return result(replicates=rows, stages=stages, **more)


def test_chains_within_a_run_are_variants_that_cost_what_leads_to_them():
    found = compared(searched(), chains=True)
    assert [variant.chain for variant in found.variants] == ["4-3-2", "4-2"]
    assert [(variant.flops, variant.seconds) for variant in found.variants] == [(6e12, 6.0), (4e12, 4.0)]
    assert found.gaps[1].mean == pytest.approx(-0.05)
    assert compared(searched(), result(1)).variants[0].flops == (8e12 + 2e12) / 2


def test_a_run_without_chains_is_named():
    with pytest.raises(RecipeError, match="run1: the run has no chains to compare"):
        compared(searched(), result(), chains=True)


def test_a_seed_that_is_there_twice_is_refused_unless_it_is_the_same_training():
    assert len(compared(result(0, stage="k"), result(0, stage="k")).variants[0].samples) == 1
    with pytest.raises(RecipeError, match="run1: seed 0 is also in run0, of the same recipe"):
        compared(result(0, stage="k"), result(0, stage="other"))


# ---------------------------------------------------------------- protocols


@pytest.mark.parametrize(
    ("key", "value"),
    [("test_images", 297), ("monitor_images", 50), ("split_seed", 1), ("selection", "best"), ("fingerprint", "e" * 64)],
)
def test_runs_of_two_protocols_are_refused_with_what_differs(key, value):
    results = result(), result(1, **{key: value})
    with pytest.raises(RecipeError, match=f"the runs' protocols differ in {key}. Compare runs of one") as refused:
        compared(*results)
    assert refused.value.__notes__ == [f"{key}: {str(PROTOCOL[key])[:12]} (run0) | {str(value)[:12]} (run1)"]
    assert compared(*results, mix=True).mixed == {key: {"run0": PROTOCOL[key], "run1": value}}


def test_another_data_set_is_another_protocol():
    with pytest.raises(RecipeError, match=r"protocols differ in data\.name") as refused:
        compared(result(), result(recipe={**RECIPE, "data": {"name": "mnist"}}))
    assert refused.value.__notes__ == ["data.name: digits (run0) | mnist (run1)"]


def test_training_that_differs_is_what_is_compared():
    other = {**RECIPE, "train": {"epochs": 9}, "data": {**RECIPE["data"], "shift": 2}, "threads": 2}
    assert len(compared(result(), result(recipe=other)).variants) == 2


def test_what_a_run_does_not_record_is_not_compared():
    assert compared(result(fingerprint=None), result(1)).mixed == {}


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"student": None}, "student: Input should be"),
        ({"student": row("k", None)}, "student.test_accuracy: Input should be a valid number"),
        ({"stages": [{"key": "k"}]}, "stages.0.seconds: Field required"),
        ({"run": {}}, "run.seed: Field required"),
        ({"replicates": {"10-2": []}}, "replicates.10-2: Tuple should have at least 1 item"),
    ],
)
def test_a_result_that_is_none_is_named(change, says):
    with pytest.raises(StorageError, match=rf"somewhere: no result to compare: {says}"):
        check_finding({**result(), **change}, "somewhere")


def write(folder, content):
    folder.mkdir()
    (folder / "result.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def finished(seed, test, **more):
    made = result(seed, test, **more)
    return {**made, "run": {**made["run"], "finished": "2026-01-01T00:00:00Z"}}


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        ("{}", 4, "result.json: no result of kdcore"),
        ("half a fi", 4, "result.json: no result of kdcore"),
        ('{"run": {"finished": "2026"}}', 4, "no result to compare: run.seed"),
    ],
)
def test_a_damaged_run_is_a_readable_error(content, code, says, cli, tmp_path):
    done = cli("compare", write(tmp_path / "a", finished(0, 0.9)), write(tmp_path / "b", content))
    assert done.code == code
    assert says in done.err
    assert "Traceback" not in done.err


def test_what_is_no_finished_run_is_a_readable_error(cli, tmp_path):
    run = write(tmp_path / "a", finished(0, 0.9))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text("{}")
    assert "nowhere: no run of kdcore. Give its folder" in cli("compare", run, "nowhere").err
    assert f"{begun}: the run is not finished. kdcore resume it first." in cli("compare", run, begun).err
    assert "one run has nothing to be compared with. Name two runs or more" in cli("compare", run).err


# ---------------------------------------------------------------- the command


def test_the_tables_say_what_was_compared_and_how(cli, tmp_path):
    results = [*pair([0.95, 0.96], [0.9, 0.92]), result(2, 0.9, recipe=recipe_with(2.0), test_images=10)]
    folders = [write(tmp_path / f"r{i}", {**r, "run": {**r["run"], "finished": "2026"}}) for i, r in enumerate(results)]
    refused = cli("compare", *folders)
    assert (refused.code, refused.out) == (2, "")
    first, second = refused.err.splitlines()
    assert first.startswith("kdcore: RecipeError: kdcore compare: the runs' protocols differ in test_images. Compare")
    assert second.startswith("  test_images: 360 (")
    done = cli("compare", *folders, "--mix-protocols", "--json", "found.json")
    assert done.code == 0, done.err
    assert "+4.50 [-1.85, +10.85]" in done.out
    assert "objective.1.temperature: 4.0 | 2.0\n" in done.out
    assert "Without a partner between 1 and 2: seed 2 of 2.\n" in done.out
    assert "The interval is over seeds alone" in done.out
    assert "WARNING  protocols differ, so the numbers are not comparable: test_images: " in done.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["gaps"][1]["low"] == pytest.approx(-0.01853, abs=1e-5)
    assert found["variants"][1]["samples"][2]["test"] == 0.9
    assert "seeds alone" in found["interval"]


@pytest.mark.parametrize("width", [80, 160])
def test_chains_are_named_once_in_the_table_or_below_it(cli, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = {f"10-8-6-4-{i} without dskd": [row(f"{i}{s}", 0.9 + s / 100, seed=s) for s in (0, 1)] for i in range(3)}
    made = finished(0, 0.9, replicates=rows, stages=[trained(f"{i}{s}") for i in range(3) for s in (0, 1)])
    done = cli("compare", write(tmp_path / "a", made), "--chains")
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()[1:]
    assert head.split()[0] == "n"
    named = [name if width == 160 else "" for name in rows]
    assert all(lines[i].startswith(f"{i + 1} {name}".strip() + "  ") for i, name in enumerate(named))
    assert all(done.out.count(name) == 1 for name in rows)
    assert (f"1: {next(iter(rows))}\n" in done.out) == (width == 80)
    assert f"All chains are of {tmp_path / 'a'}.\n" in done.out


def test_comparing_imports_no_torch(shell, tmp_path):
    folders = [write(tmp_path / f"r{i}", finished(i, 0.9 + i / 100)) for i in range(2)]
    done = shell("-X", "importtime", "-m", "kdcore", "compare", *folders, "--json", "found.json")
    assert done.code == 0, done.err
    assert not {"torch", "matplotlib"} & {line.rpartition("|")[2].strip() for line in done.err.splitlines()}


def test_the_table_of_a_search_measures_each_chain_against_the_direct_student_under_its_controllers():
    stages = []
    for seed in (0, 1):
        for kind, controllers in (("", ["dskd"]), ("bare", [])):
            own = [trained(f"{kind}direct{seed}", f"t{seed}", controllers=controllers)]
            own += [trained(f"{kind}assistant{seed}", f"t{seed}", controllers=controllers)]
            own += [trained(f"{kind}long{seed}", f"{kind}assistant{seed}", controllers=controllers)]
            stages += [{**stage, "seed": seed} for stage in own]
        stages.insert(0, trained(f"t{seed}"))
    tests = {"long": (0.96, 0.97), "baredirect": (0.8, 0.8), "barelong": (0.81, 0.83), "direct": (0.95, 0.93)}
    names = {"long": "4-3-2", "baredirect": "4-2 without dskd", "barelong": "4-3-2 without dskd", "direct": "4-2"}
    for stage in stages:  # the last of a chain is smaller than its assistants, which are no direct students
        accuracy = {key: tests[key[:-1]][int(key[-1])] for key in [stage["key"]] if key[:-1] in tests}
        model = "mlp-1" if accuracy else "mlp-3"
        stage["members"]["student"].update(model=model, test_accuracy=accuracy.get(stage["key"]))
        stage["members"]["teacher"].update(test_accuracy=None)
    rows = {name: [row(f"{key}{s}", tests[key][s], seed=s) for s in (0, 1)] for key, name in names.items()}
    made = result(stage="long0", replicates=rows, stages=stages)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(chains_table(made))
    lines = [line.rstrip() for line in shown.get().splitlines()[-6:]]
    assert lines[0].split() == ["test", "%", "monitor", "%"]
    assert lines[1].split() == ["chain", "n", *["mean", "±", "sd"] * 2, "over", "direct"]
    assert lines[2] == "4-3-2 (chosen)      2  96.50 ± 0.71  91.00 ± 0.00  +2.50 [-16.56, +21.56]"
    assert lines[3].split() == ["4-2", "without", "dskd", "2", "80.00", "±", "0.00", "91.00", "±", "0.00"]
    assert lines[4] == "4-3-2 without dskd  2  82.00 ± 1.41  91.00 ± 0.00  +2.00 [-10.71, +14.71]"
    assert lines[5].split() == ["4-2", "2", "94.00", "±", "1.41", "91.00", "±", "0.00"]
    reported = {learner: above for learner, *_, above in replicates(made).rows}
    assert reported["4-3-2 (chosen)"].startswith("+2.50")
    assert reported["4-3-2 without dskd"].startswith("+2.00")
    assert reported["4-2"] == reported["4-2 without dskd"] == "–"


def test_two_recipes_over_three_seeds(tiny, cli, tmp_path):
    recipe = tiny()
    other = 'objective=[{ loss = "cross_entropy", weight = 0.1 }, { loss = "kd", weight = 0.9, temperature = 2.0 }]'
    for seed in range(3):
        for more in ([], ["--set", other]):
            assert cli("run", recipe, "--set", f"seed={seed}", *more).code == 0
    folders = sorted(tmp_path.glob("runs/tiny-*"))
    assert len(folders) == 6
    assert "torch" in sys.modules
    done = cli("compare", *folders, "--json", "found.json")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text())
    tests = [[sample["test"] for sample in variant["samples"]] for variant in found["variants"]]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert sorted(tests[0] + tests[1]) == sorted(result["student"]["test_accuracy"] for result in results)
    assert found["gaps"][1]["seeds"] == [0, 1, 2]
    assert found["gaps"][1]["mean"] == pytest.approx((sum(tests[1]) - sum(tests[0])) / 3)
    assert len({result["protocol"]["fingerprint"] for result in results}) == 1
    assert "objective.1.temperature: " in done.out
