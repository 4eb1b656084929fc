"""The stop rules: when they end distillation, that they survive a resume, and that the work they end is gone."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import RECIPE, die_at_step_30, make_run, weights
from test_readme import blocks

from kdcore.errors import PlanError
from kdcore.plan import Decision, Drop, Set, TickView
from kdcore.plugins import load_plugins

CATALOG = load_plugins().catalog
KNOBS = {
    "student.lr": 0.05,
    "student.cross_entropy.weight": 0.1,
    "student.cross_entropy.source": None,
    "student.kd.weight": 0.9,
    "student.kd.source": "teacher",
    "student.kd.temperature": 4.0,
}
COSINE = "cosine.cross_entropy.kd"
Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Script:
    """What a rule sees: numbers of each tick, None where there is none. ``beside``: the control is in the stage."""

    student: Numbers
    control: Numbers = ()
    cosine: Numbers = ()
    beside: bool = False
    cosine_name: str = COSINE
    knobs: tuple[tuple[str, Any], ...] = tuple(KNOBS.items())

    def views(self) -> Iterator[TickView]:
        length = max(len(self.student), len(self.cosine))
        control = rows({"accuracy": self.control})
        for tick in range(1, length + 1):
            student = rows({"accuracy": self.student[:tick], self.cosine_name: self.cosine[:tick]})
            curves = {"student": student, "teacher": rows({"accuracy": [0.5] * tick})}
            curves |= {"control": control[:tick]} if self.beside else {}
            used = {} if self.beside else {"control": control}
            yield TickView(tick, float(tick), 10 * tick, length, curves, used, dict(self.knobs))


def rows(metrics: dict[str, Numbers]) -> tuple[dict[str, float], ...]:
    ticks = max(map(len, metrics.values()))
    found: list[dict[str, float]] = [{"tick": tick, "epoch": float(tick)} for tick in range(1, ticks + 1)]
    for name, values in metrics.items():
        for row, value in zip(found, values, strict=False):
            row |= {} if value is None else {name: value}
    return tuple(found)


def make(name: str, **options: Any) -> Any:
    entry = CATALOG.find("controller", name)
    return entry.load()(entry.options_class()(**options))


def decisions(rule: Any, views: Sequence[TickView] | Iterator[TickView]) -> list[list[Decision]]:
    return [list(rule.decide(view)) for view in views]


def stops(rule: Any, script: Script) -> list[int]:
    """The ticks at which a rule decided something."""
    return [tick for tick, found in enumerate(decisions(rule, script.views()), 1) if found]


# ---------------------------------------------------------------- when they stop

RISING, FLAT, FALLING = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [0.5] * 6, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
GAPS: Numbers = [0.5, None, 0.5, None, None, 0.5]


@pytest.mark.parametrize("beside", [False, True], ids=["shared", "side-by-side"])
@pytest.mark.parametrize(
    ("student", "control", "options", "expected"),
    [
        (RISING, [0.3] * 6, {}, []),
        (FLAT, FLAT, {}, [3]),  # as good is not better
        (FLAT, FLAT, {"patience": 1}, [1]),
        (FALLING, [0.7] * 6, {}, [5]),  # the tie at tick 3 counts
        (FALLING, [0.7] * 6, {"consecutive": True}, [5]),
        ([0.4, 0.6, 0.4, 0.6, 0.4, 0.6], FLAT, {}, [5]),  # never reset within a stage
        ([0.4, 0.6, 0.4, 0.6, 0.4, 0.6], FLAT, {"consecutive": True}, []),
        ([0.4, 0.4, 0.6, 0.4, 0.4, 0.4], FLAT, {"consecutive": True}, [6]),
        (GAPS, FLAT, {}, [6]),
        (FLAT, GAPS, {}, [6]),
        ([None] * 6, FLAT, {}, []),
        (FLAT, [0.5, 0.5], {}, []),  # a control that ended early
    ],
)
def test_dskd_stops_when_the_control_was_as_good_patience_times(student, control, options, expected, beside):
    assert stops(make("dskd", **options), Script(student, control, beside=beside)) == expected


@pytest.mark.parametrize(
    ("student", "options", "expected"),
    [
        (RISING, {}, []),
        (FLAT, {}, [4]),  # the first is the best so far, the next three are no better
        (FALLING, {}, [4]),
        (FLAT, {"patience": 1}, [2]),
        ([0.5, 0.6, 0.5, 0.6, 0.5, 0.7], {}, [5]),  # a tie with the best is no gain
        ([0.5, 0.4, 0.4, 0.6, 0.5, 0.5], {}, []),
        ([0.5, 0.505, 0.508, 0.512, 0.515, 0.52], {"min_delta": 0.01}, []),  # small steps add up
        ([0.5, 0.505, 0.508, 0.509, 0.6, 0.7], {"min_delta": 0.01}, [4]),
        (GAPS, {"patience": 2}, [6]),
        ([None] * 6, {}, []),
    ],
)
def test_plateau_stops_when_the_student_was_no_better_patience_times_in_a_row(student, options, expected):
    assert stops(make("plateau", **options), Script(student)) == expected


@pytest.mark.parametrize(
    ("cosine", "options", "expected"),
    [
        ([0.9, 0.5, 0.1, 0.2, 0.3], {}, []),
        ([0.9, 0.5, -0.1, 0.2, 0.3], {}, [3]),
        ([0.0] * 5, {}, []),  # at the bound is not below it
        ([0.4, 0.2, 0.1, 0.1, 0.0], {"bound": 0.15}, [3]),
        ([-0.1, 0.1, -0.1, -0.1, 0.1], {"patience": 2}, [4]),
        ([-0.1, 0.1, -0.1, 0.1, -0.1], {"patience": 2}, []),
        ([-0.1, None, None, -0.1, 0.1], {"patience": 2}, [4]),  # what was not measured counts neither way
        ([None] * 5, {}, []),
    ],
)
def test_gradient_stops_when_the_gradients_conflicted_patience_times_in_a_row(cosine, options, expected):
    assert stops(make("gradient", **options), Script(FLAT[:5], cosine=cosine)) == expected


@pytest.mark.parametrize("student", [RISING, FLAT, FALLING, [None] * 6])
def test_earlystop_looks_at_the_clock_alone(student):
    assert stops(make("earlystop"), Script(student)) == [2]
    assert stops(make("earlystop", fraction=0.99), Script(student)) == [6]


@pytest.mark.parametrize(("length", "percent", "tick"), [(25, 28, 7), (50, 14, 7), (20, 55, 11), (30, 34, 11)])
def test_earlystop_counts_exact_shares(length: int, percent: int, tick: int):
    assert stops(make("earlystop", fraction=percent / 100), Script([0.5] * length)) == [tick]
    assert tick == -(-percent * length // 100)


def test_gradient_compares_the_first_pair_of_labels_and_teacher_that_was_measured():
    sources = {"hint": "teacher", "kd": "teacher", "cross_entropy": None, "smooth": None}
    knobs = {f"student.{term}.source": source for term, source in sources.items()}
    knobs |= {f"student.{term}.weight": 1.0 for term in sources} | {"teacher.kd.source": None, "teacher.kd.weight": 0.0}

    def stopped(name: str) -> bool:
        script = Script((), cosine=[-1.0], cosine_name=name, knobs=tuple(knobs.items()))
        return bool(stops(make("gradient"), script))

    assert stopped("cosine.kd.cross_entropy")  # hint needs features, so it has no cosine
    assert not stopped("cosine.hint.kd")
    assert not stopped("cosine.cross_entropy.smooth")


# ---------------------------------------------------------------- what they decide

STOPPING: dict[str, tuple[dict[str, Any], Script, str]] = {
    "dskd": ({}, Script(FLAT, FLAT), "the control was as good 3 times (now 50.00%, the student 50.00%)"),
    "earlystop": ({}, Script(FLAT), "2 of 6 epochs are over"),
    "plateau": ({}, Script(FALLING), "3 times in a row the student was not above its best of 90.00% (now 60.00%)"),
    "gradient": (
        {"patience": 2},
        Script((), cosine=[0.5, -0.25, -0.5]),
        "2 times in a row the cosine between the gradients of labels and teacher was below 0 (now -0.500)",
    ),
}
FACTORS = {"student.kd.weight": 0.0, "student.cross_entropy.weight": 1.0}


@pytest.mark.parametrize("name", STOPPING)
def test_a_stop_leaves_labels_alone_and_says_why(name: str):
    options, script, reason = STOPPING[name]
    for label_weight in (1.0, 0.5):
        (stop,) = filter(None, decisions(make(name, label_weight=label_weight, **options), script.views()))
        wanted = {**FACTORS, "student.cross_entropy.weight": label_weight}
        assert stop == [Set(knob, value, reason) for knob, value in wanted.items()]


@pytest.mark.parametrize("name", STOPPING)
def test_where_another_rule_stopped_before_there_is_nothing_to_decide(name: str):
    """Its events would say a second time, and of a later epoch, that distillation ended."""
    options, script, _ = STOPPING[name]
    stopped = replace(script, knobs=tuple({**KNOBS, **FACTORS}.items()))
    assert not any(decisions(make(name, **options), stopped.views()))


def test_dskd_drops_a_control_beside_the_student():
    (stop,) = filter(None, decisions(make("dskd"), Script(FLAT, FLAT, beside=True).views()))
    assert [d.member for d in stop if isinstance(d, Drop)] == ["control"]


def test_a_margin_is_part_of_plateaus_reason():
    (stop,) = filter(None, decisions(make("plateau", patience=1, min_delta=0.01), Script([0.5, 0.505]).views()))
    assert stop[0].reason == "the student was not above its best of 50.00% by more than 1.00% (now 50.50%)"


@pytest.mark.parametrize("name", STOPPING)
def test_a_student_without_labels_to_go_on_with_is_refused_before_anything_is_trained(tmp_path: Path, name: str):
    recipe = {**RECIPE, "objective": [{"loss": "kd"}], "controller": [{"name": name}]}
    with pytest.raises(PlanError, match=r"objective: no term on labels .*cross_entropy"):
        make_run(tmp_path, recipe=recipe).execute()
    assert not list(tmp_path.glob("store/results/*"))


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ([{"loss": "cross_entropy"}], 'no term of distillation .*loss = "kd"'),
        ([{"loss": "cross_entropy", "weight": 0}, {"loss": "kd"}], 'no term on labels .*loss = "cross_entropy"'),
        ([{"loss": "cross_entropy"}, {"loss": "kd", "weight": 0}], "no term of distillation .*weight above 0"),
    ],
)
def test_gradient_refuses_an_objective_whose_gradients_it_could_never_compare(tmp_path: Path, objective, says):
    recipe = {**RECIPE, "objective": objective, "controller": [{"name": "gradient"}]}
    with pytest.raises(PlanError, match=says):
        make_run(tmp_path, recipe=recipe).execute()


# ---------------------------------------------------------------- under any numbers


@st.composite
def played(draw: st.DrawFn) -> tuple[str, dict[str, Any], Script]:
    """A rule, its options and numbers of at most 12 ticks, with ties and gaps."""
    length = draw(st.integers(1, 12))
    share = st.sampled_from([None, 0.3, 0.4, 0.5, 0.6])
    cosine = st.sampled_from([None, -0.5, -0.1, 0.0, 0.1, 0.5])
    student, control = (draw(st.lists(share, min_size=length, max_size=length)) for _ in range(2))
    cosines = draw(st.lists(cosine, min_size=length, max_size=length))
    name = draw(st.sampled_from(sorted(STOPPING)))
    options: dict[str, Any] = {"patience": draw(st.integers(1, 4))} if name != "earlystop" else {}
    if name == "earlystop":
        options["fraction"] = draw(st.integers(1, 99)) / 100
    if name == "dskd":
        options["consecutive"] = draw(st.booleans())
    if name == "gradient":
        options["bound"] = draw(st.sampled_from([-0.1, 0.0, 0.3]))
    return name, options, Script(student, control, cosines, draw(st.booleans()))


def counted(name: str, options: dict[str, Any], script: Script) -> list[tuple[int, Any]]:
    """What a rule counts: the ticks that have all of its numbers, with these."""
    if name == "gradient":
        return [(t, c < options["bound"]) for t, c in enumerate(script.cosine, 1) if c is not None]
    if name == "plateau":
        return [(t, s) for t, s in enumerate(script.student, 1) if s is not None]
    both = enumerate(zip(script.student, script.control, strict=True), 1)
    return [(t, s <= c) for t, (s, c) in both if s is not None and c is not None]


def expected_stop(name: str, options: dict[str, Any], script: Script) -> int | None:
    """By definition, without state: the first tick at which the past is such that the rule stops."""
    if name == "earlystop":
        ticks, share = len(script.student), Fraction(str(options["fraction"]))
        return next(t for t in range(1, ticks + 1) if t >= share * ticks)
    found, patience = counted(name, options, script), options["patience"]

    def due(past: list[Any]) -> bool:
        last = past[-patience:]
        if name == "plateau":
            return len(past) > patience and max(last) <= max(past[:-patience])
        if name == "dskd" and not options["consecutive"]:
            return sum(past) >= patience
        return len(last) == patience and all(last)

    values = [value for _, value in found]
    return next((tick for n, (tick, _) in enumerate(found, 1) if due(values[:n])), None)


@settings(max_examples=300)
@given(played())
def test_a_rule_stops_once_and_exactly_when_its_definition_says(case):
    name, options, script = case
    expected = expected_stop(name, options, script)
    assert stops(make(name, **options), script) == ([] if expected is None else [expected])
    if expected is not None and name != "earlystop":
        assert expected >= options["patience"] + (name == "plateau")


@settings(max_examples=200)
@given(played())
def test_a_rule_that_is_taken_up_again_after_any_tick_decides_as_if_it_had_not_been(case):
    name, options, script = case
    views = list(script.views())
    whole = decisions(make(name, **options), views)
    for tick in range(len(views) + 1):
        first, second = make(name, **options), make(name, **options)
        decisions(first, views[:tick])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert decisions(second, views[tick:]) == whole[tick:]


# ---------------------------------------------------------------- in training

STOP = 4
"""After a checkpoint at tick 2, where each rule has counted half of its patience."""
TRAINED: dict[str, dict[str, Any]] = {
    "dskd": {"name": "dskd", "patience": STOP},
    "dskd side by side": {"name": "dskd", "patience": STOP, "mode": "side-by-side"},
    "earlystop": {"name": "earlystop", "fraction": 0.6},
    "plateau": {"name": "plateau", "patience": STOP - 1, "min_delta": 0.99},
    "gradient": {"name": "gradient", "patience": STOP, "bound": 1.0},
}


def harmed(rule: str) -> dict[str, Any]:
    """A poor teacher, heeded too much, so that a control is better from the first epoch on."""
    train = {"epochs": 6, "teacher": {"epochs": 1}}
    objective = [{"loss": "cross_entropy"}, {"loss": "kd", "weight": 50}]
    return {**RECIPE, "train": train, "objective": objective, "controller": [TRAINED[rule]]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Folder and result.json of an uninterrupted run under a rule, trained once."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(rule: str) -> tuple[Path, dict[str, Any]]:
        if rule not in found:
            root = tmp_path_factory.mktemp("rule")
            found[rule] = root, make_run(root, recipe=harmed(rule)).execute()
        return found[rule]

    return get


@pytest.mark.parametrize("rule", TRAINED)
def test_from_the_stop_on_teacher_and_control_no_longer_run(trained, rule: str):
    _, result = trained(rule)
    stage, images = result["stages"][-1], result["protocol"]["train_images"]
    forward = {name: member["flops"] for name, member in stage["members"].items()}
    assert stage["flops"]["teacher"] == STOP * images * forward["teacher"]
    assert stage["flops"]["student"] == 6 * images * 3 * forward["student"]
    assert stage["flops"].get("control") == (
        STOP * images * 3 * forward["control"] if rule == "dskd side by side" else None
    )


@pytest.mark.parametrize("rule", TRAINED)
def test_a_stop_is_recorded_with_its_epoch_and_reason(trained, rule: str):
    events = trained(rule)[1]["stages"][-1]["events"]
    targets = ["student.kd.weight", "student.cross_entropy.weight"]
    assert [e["target"] for e in events] == [*targets, *(["control"] if rule == "dskd side by side" else [])]
    assert {(e["controller"], e["tick"], e["epoch"]) for e in events} == {(TRAINED[rule]["name"], STOP, float(STOP))}
    assert len({e["reason"] for e in events}) == 1
    assert events[0]["reason"]


@pytest.mark.parametrize("rule", TRAINED)
def test_a_run_that_dies_before_the_stop_stops_at_the_same_tick_with_the_same_weights(trained, tmp_path, rule: str):
    root, result = trained(rule)
    sets = ["execute.checkpoint_seconds=0"]
    die_at_step_30(make_run(tmp_path, recipe=harmed(rule), sets=sets))
    again = make_run(tmp_path, recipe=harmed(rule), sets=sets).execute()
    for part in ("events", "flops"):
        assert again["stages"][-1][part] == result["stages"][-1][part]
    for member in ("student", "control"):
        assert weights(tmp_path, member) == weights(root, member)


# ---------------------------------------------------------------- the guide

GUIDE = (Path(__file__).parents[1] / "docs" / "stops.md").read_text()


def test_the_guide_has_every_option_with_its_default():
    printed: dict[str, dict[str, str]] = {}
    rule = ""
    for name, option, default in re.findall(r"^\| (`\w+`|all|) ?\| `(\w+)` \| `(.+?)` \|", GUIDE, re.M):
        rule = name.strip("`") or rule
        printed.setdefault(rule, {})[option] = default
    common = printed.pop("all")
    assert sorted(printed) == sorted(STOPPING)
    for rule, options in printed.items():
        fields = CATALOG.find("controller", rule).options_class().model_fields
        defaults = {
            name: "1/3" if field.default == 1 / 3 else json.dumps(field.default) for name, field in fields.items()
        }
        assert {**options, **common} == defaults


def test_the_guides_recipe_ends_distillation_by_one_of_its_rules(tmp_path: Path):
    result = make_run(tmp_path, recipe=tomllib.loads(*blocks("toml", GUIDE))).execute()
    events = result["stages"][-1]["events"]
    assert {e["target"] for e in events} == {"student.kd.weight", "student.cross_entropy.weight"}
    assert {e["controller"] for e in events} <= {"dskd", "earlystop"}
    assert events[0]["tick"] <= 6
