"""The strategy ``variants``: several objectives under one teacher, their options from a grid on the monitor split."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kdcore_variants.options import VariantsOptions
from kdcore_variants.strategy import Variants
from small import make_run

import kdcore
from kdcore import Choice, MemberResult, NumericError, RecipeError, Result, Spec
from kdcore.options import validate
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load
from kdcore.testing.strategy import run_view

LABELS = {"loss": "cross_entropy"}


def variant(name: str, loss: str = "kd", grid: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"name": name, "objective": [LABELS, {"loss": loss, **options}], "grid": grid or {}}


def drive(script: dict[str, float | None], variants: list[dict[str, Any]], run: Any = None, **options: Any) -> Any:
    """To the strategy's end; a student is worth what ``script`` says of its name, else a half; None: diverged."""
    plan = Variants().plan(run or run_view(), validate(VariantsOptions, {"variant": variants, **options}, "strategy"))
    asked, choices, answer = [], [], None
    while True:
        try:
            wanted = plan.send(answer)
        except StopIteration as end:
            return asked, choices, end.value
        answer = None
        if isinstance(wanted, Choice):
            choices.append(wanted)
        else:
            asked.append(wanted)
            answer = [answered(stage, script) for stage in wanted]


def answered(stage: Any, script: dict[str, float | None]) -> Result:
    members = {}
    for name, member in stage.members.items():
        if member.terms:
            worth = script.get(f"{name}@{stage.seed}", script.get(name, 0.5))
            lost, worth = worth is None, float("nan") if worth is None else worth
            members[name] = MemberResult(stage[name], worth, worth, (), 1, 1, diverged=lost)
    return Result(stage, stage.identity, members, (), 1.0, 1)


def learners(stage: Any) -> list[str]:
    return [name for name, member in stage.members.items() if member.terms]


def test_all_variants_share_one_teacher_and_one_stage_a_seed():
    asked, choices, outcome = drive({}, [variant("kd"), variant("dkd", "dkd")], seeds=3)
    assert choices == []
    teacher, *stages = asked[0]
    assert [learners(stage) for stage in stages] == [["kd", "dkd"]] * 3
    assert [stage.seed for stage in stages] == [0, 1, 2]
    assert all(stage.members["teacher"].init == teacher["teacher"] for stage in stages)
    assert {name: len(refs) for name, refs in outcome.replicates.items()} == {"kd": 3, "dkd": 3}


def test_the_grid_is_every_combination_and_its_best_point_is_trained_in_full():
    grid = {"kd.weight": [1.0, 4.0], "kd.temperature": [2.0, 8.0]}
    script = {"kd-1": 0.3, "kd-2": 0.5, "kd-3": 0.7, "kd-4": 0.6}
    asked, choices, _ = drive(script, [variant("kd", grid=grid), variant("dkd", "dkd")], grid_epochs=1)
    (_, tried), (_, final) = asked
    assert learners(tried) == ["kd-1", "kd-2", "kd-3", "kd-4"]
    assert (tried.length, final.length) == (1, 3)
    points = [
        (tried.members[f"kd-{i}"].terms[1].weight, tried.members[f"kd-{i}"].terms[1].options) for i in (1, 2, 3, 4)
    ]
    assert points == [(w, {"temperature": t}) for w in (1.0, 4.0) for t in (2.0, 8.0)]
    assert final.members["kd"].terms == tried.members["kd-3"].terms
    assert [choice.text for choice in choices] == [
        "kd: kd.weight = 4.0, kd.temperature = 2.0 of 4 points, 70.00% on the monitor split, kd.weight and "
        "kd.temperature at the edge of its grid, before kd.weight = 4.0, kd.temperature = 8.0"
    ]
    assert choices[0].margin == pytest.approx(0.1)


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=2, max_size=6))
def test_the_chosen_point_is_the_first_of_the_best_on_the_monitor_split(worths):
    script = {f"kd-{i}": worth for i, worth in enumerate(worths, 1)}
    weights = [float(i) for i in range(1, len(worths) + 1)]
    asked, _, _ = drive(script, [variant("kd", grid={"kd.weight": weights})])
    known = [-1.0 if worth != worth else worth for worth in worths]
    assert asked[1][1].members["kd"].terms[1].weight == 1.0 + known.index(max(known))


@pytest.mark.parametrize(
    ("grid", "at_edge"),
    [
        ({"kd.weight": [1.0, 2.0, 4.0]}, False),
        ({"kd.weight": [4.0, 2.0, 1.0]}, False),
        ({"kd.weight": [1.0, 4.0, 2.0]}, True),
        ({"kd.weight": [2.0]}, False),
        ({"kd.normalize": ["none", "instance"]}, False),
    ],
)
def test_a_choice_at_the_edge_of_its_grid_says_so(grid, at_edge):
    _, choices, _ = drive({"kd-2": 0.7}, [variant("kd", grid=grid)])
    assert ("kd.weight at the edge of its grid" in choices[0].text) == at_edge


def test_a_point_that_diverged_is_not_chosen_and_is_told_of():
    _, choices, outcome = drive(
        {"kd-1": None, "kd-2": 0.1}, [variant("kd", grid={"kd.weight": [1.0, 2.0]})], diverged="drop"
    )
    assert choices[0].text.startswith("kd: kd.weight = 2.0 of 2 points (1 diverged)")
    assert "kd.weight = 2.0" in outcome.note


def test_a_grid_that_diverged_whole_ends_the_run():
    with pytest.raises(NumericError, match="variant 'kd': every point of its grid diverged"):
        drive({"kd-1": None}, [variant("kd", grid={"kd.weight": [1.0]})], diverged="drop")


@given(st.integers(1, 7), st.integers(1, 9))
def test_no_stage_holds_more_students_than_may_be_together(together, count):
    variants = [variant(f"v{i}") for i in range(count)]
    asked, _, outcome = drive({}, variants, together=together, seeds=2)
    assert all(len(learners(stage)) <= together for stage in asked[0][1:])
    assert sorted(name for stage in asked[0][1:] for name in learners(stage)) == sorted(
        2 * [v["name"] for v in variants]
    )
    assert all([ref.stage.seed for ref in refs] == [0, 1] for refs in outcome.replicates.values())


def test_the_variant_that_is_best_over_seeds_is_delivered_by_its_first_seed():
    script = {"a@0": 0.9, "a@1": 0.1, "b@0": 0.6, "b@1": 0.6}
    _, _, outcome = drive(script, [variant("a"), variant("b")], seeds=2)
    assert (outcome.student.member, outcome.student.stage.seed) == ("b", 0)
    assert list(outcome.replicates) == ["b", "a"]
    assert outcome.note.startswith("b is best on the monitor split")


@pytest.mark.parametrize(
    ("variants", "text"),
    [
        ([variant("kd"), variant("kd", "dkd")], "the name 'kd' is taken"),
        ([variant("teacher")], "the name 'teacher' is taken"),
        ([variant("kd", grid={"dkd.weight": [1.0]})], "its terms are cross_entropy, kd"),
        ([variant("kd", grid={"weight": [1.0]})], "Write TERM.OPTION"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(variants, text):
    with pytest.raises(RecipeError, match=text):
        drive({}, variants)


def test_a_class_normalised_variant_leaves_out_the_ragged_last_batch():
    recipe = {**RECIPE, "data": {"name": "digits", "batch_size": 128}}
    catalog = load_plugins().catalog
    assert compile_recipe(load(recipe), catalog)[0].data.drop_last
    tried = {"name": "variants", "variant": [variant("kd", grid={"kd.normalize": ["none", "class"]})]}
    assert compile_recipe(load({**recipe, "strategy": tried}), catalog)[0].data.drop_last
    plain = {**recipe, "strategy": {"name": "variants", "variant": [variant("kd")]}}
    assert not compile_recipe(load(plain), catalog)[0].data.drop_last


def test_a_grid_without_values_is_refused():
    with pytest.raises(RecipeError, match=r"strategy.variant\[0\].grid"):
        drive({}, [variant("kd", grid={"kd.weight": []})])


def test_a_ledger_is_kept_of_every_stage_of_students():
    asked, _, _ = drive({}, [variant("kd", grid={"kd.weight": [1.0, 2.0]})], run_view(ledger=50))
    (teacher, *tried), (_, *final) = asked
    assert [stage.ledger for stage in (*tried, *final)] == [50, 50]
    assert teacher.ledger == 0


def test_controllers_are_refused():
    with pytest.raises(RecipeError, match="variants take no controllers"):
        drive({}, [variant("kd")], run_view(controllers=(Spec("dskd/dskd"),)))


# ---------------------------------------------------------------- runs

RECIPE: dict[str, Any] = {
    "threads": 1,
    "data": {"name": "digits", "batch_size": 128, "drop_last": True},
    "teacher": {"model": "mlp", "size": 2, "width": 32},
    "student": {"model": "mlp", "size": 1},
    "train": {"epochs": 2},
    "strategy": {
        "name": "variants",
        "grid_epochs": 1,
        "variant": [variant("kd", grid={"kd.weight": [1.0, 2.0]}), variant("dkd", "dkd", normalize="class")],
    },
}


def test_a_student_among_others_is_the_one_that_it_is_alone(tmp_path):
    alone = {**RECIPE["strategy"], "variant": [variant("kd", weight=2.0)]}
    both = {**RECIPE["strategy"], "variant": [variant("kd", weight=2.0), variant("dkd", "dkd")]}
    curves = []
    for name, strategy in (("alone", alone), ("both", both)):
        run = make_run(tmp_path / name, recipe={**RECIPE, "strategy": strategy})
        (row,) = run.execute()["replicates"]["kd"]
        curves.append(run.store.result(row["stage"])["members"]["kd"]["curve"])
    assert curves[0] == curves[1]


def test_a_second_run_takes_everything_from_the_store(tmp_path):
    first = make_run(tmp_path, recipe=RECIPE, name="first")
    second = make_run(tmp_path, recipe=RECIPE, name="second")
    one, two = first.execute(), second.execute()
    assert all(stage["reused"] for stage in two["stages"])
    assert one["replicates"] == two["replicates"]
    assert [choice["text"] for choice in one["choices"]] == [choice["text"] for choice in two["choices"]]


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ([{"loss": "kdd"}], "strategy.variant[0].objective[0].loss: unknown loss 'kdd'. Did you mean 'kd'?"),
        ([LABELS, {"loss": "kd", "temprature": 2.0}], "strategy.variant[0].objective[1].temprature: unknown key"),
        ([LABELS, {"loss": "kd"}, {"loss": "kd"}], "strategy.variant[0].objective[1]"),
    ],
)
def test_an_error_in_an_objective_names_its_place(tmp_path, objective, text):
    strategy = {"name": "variants", "variant": [{"name": "one", "objective": objective}]}
    with pytest.raises(RecipeError) as caught:
        kdcore.run({**RECIPE, "strategy": strategy}, root=tmp_path, quiet=True)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values", "text"),
    [
        ("kd.wieght", [1.0], """strategy.variant[1].grid."kd.wieght": unknown key. Did you mean 'weight'?"""),
        ("kd.temperature", [2.0, "hot"], 'strategy.variant[1].grid."kd.temperature": '),
        ("kdd.weight", [1.0], 'strategy.variant[1].grid."kdd.weight": no such term. Write TERM.OPTION'),
    ],
)
def test_an_error_in_a_grid_names_its_key(tmp_path, key, values, text):
    strategy = {"name": "variants", "variant": [variant("dkd", "dkd"), variant("kd", grid={key: values})]}
    with pytest.raises(RecipeError) as caught:
        kdcore.run({**RECIPE, "strategy": strategy}, root=tmp_path, quiet=True)
    assert str(caught.value).startswith(text)


DIVERGING = {
    **RECIPE,
    "execute": {"log_every": 3, "checkpoint_seconds": 0.0001},
    "strategy": {
        "name": "variants",
        "diverged": "drop",
        "variant": [variant("kd", grid={"kd.weight": [1.0, 1e38, 2.0]})],
    },
}


def test_a_point_that_diverges_is_dropped_and_the_others_learn_what_they_learn_without_it(tmp_path):
    run = make_run(tmp_path, recipe=DIVERGING)
    result = run.execute()
    grid = next(stage for stage in result["stages"] if stage["name"].endswith("(grid)"))
    first, lost, last = (grid["members"][f"kd-{i}"] for i in (1, 2, 3))
    assert lost["monitor_accuracy"] is lost["test_accuracy"] is None
    assert lost["diverged"]
    assert any("member 'kd-2' diverged by step 3" in text for text in result["warnings"])
    assert {path.name for path in tmp_path.glob("store/results/*/kd-*")} == {"kd-1.safetensors", "kd-3.safetensors"}
    sound = {**DIVERGING["strategy"], "variant": [variant("kd", grid={"kd.weight": [1.0, 2.0]})]}
    other = make_run(tmp_path, recipe={**DIVERGING, "strategy": sound}, name="sound").execute()
    alone = next(stage for stage in other["stages"] if stage["name"].endswith("(grid)"))["members"]
    assert (first["curve"], last["curve"]) == (alone["kd-1"]["curve"], alone["kd-2"]["curve"])


def test_a_run_that_dies_after_a_point_diverged_goes_on_without_it(tmp_path):
    whole = make_run(tmp_path / "whole", recipe=DIVERGING).execute()
    run = make_run(tmp_path, recipe=DIVERGING)
    handle = run.console.handle

    def die(event):
        handle(event)
        if event["kind"] == "checkpoint" and event["step"] == 6 and "(grid)" in event["name"]:
            raise KeyboardInterrupt

    run.console.handle = die
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    again = make_run(tmp_path, recipe=DIVERGING)
    result = again.execute()
    assert again.console.kinds("stage_started")[0]["step"] == 6
    assert [choice["text"] for choice in result["choices"]] == [choice["text"] for choice in whole["choices"]]
    assert result["warnings"] == whole["warnings"]


PEERS = """
from kdcore import Member, OptimizerSpec, Outcome, Stage, Term, hookimpl

@hookimpl
def kdcore_register(registry):
    registry.strategy("peers", Peers)

class Peers:
    def plan(self, run, options):
        wild = Member(run.student, terms=run.labels, optimizer=OptimizerSpec(lr=1e30))
        calm = Member(run.student, terms=(*run.labels, Term("core/kd", "wild")), optimizer=run.optimizer)
        stage = Stage("peers", {"wild": wild, "calm": calm}, run.data, 1, diverged="drop")
        yield stage
        return Outcome(stage["calm"])
"""


def test_a_member_that_others_learn_from_is_not_dropped(tmp_path):
    (tmp_path / "peers.py").write_text(PEERS)
    host = load_plugins(files=[tmp_path / "peers.py"])
    run = make_run(tmp_path, recipe={**RECIPE, "strategy": {"name": "peers"}}, sets=["student.size=2"], host=host)
    with pytest.raises(NumericError, match="member 'wild'"):
        run.execute()
