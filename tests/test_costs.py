"""The cost of a run: sums by hand, sums by hypothesis, and a real stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from results import IMAGES, distilled, member, on_labels, result, stage
from small import RECIPE, make_run

from kdcore.costs import Work, costs

ROLES = ("teachers", "students", "controls", "first_teachers")


def dskd_search():
    """10-2, 10-4-2 and 10-6-2 with shared controls: in 10-4 distillation stops after 250 of 1,000 images."""
    teacher = on_labels("10", "mlp-10")
    controls = [on_labels(f"control-{n}", f"mlp-{n}", "control") for n in (2, 4, 6)]
    direct = distilled("10-2", "mlp-2", teacher, control="control-2")
    four = distilled("10-4", "mlp-4", teacher, stopped=250, control="control-4")
    six = distilled("10-6", "mlp-6", teacher, control="control-6", reused=True)
    students = [distilled(f"10-{s['key'][-1]}-2", "mlp-2", s, control="control-2") for s in (four, six)]
    return [teacher, *controls, direct, four, six, *students]


def test_work_by_role_equals_sums_by_hand():
    found = costs(result(dskd_search(), evidence={"chains_skipped": 2.0}))
    assert (found.trained, found.reused, found.chains_skipped) == (8, 1, 2)
    assert found.first_teachers == Work(3 * 1000 * 100, 10.0)
    assert found.controls == Work(3 * 1000 * (20 + 40 + 60), 30.0)
    assert found.students == Work(3 * 1000 * (20 + 40 + 60 + 20 + 20), 50.0)
    assert found.teachers == Work(1000 * 100 + 250 * 100 + 1000 * 100 + 1000 * 40 + 1000 * 60, 42.5)
    assert found.rest == pytest.approx(9.0)  # one second a stage


def test_a_stop_saves_the_teachers_passes_over_what_was_left():
    found = costs(result(dskd_search()))
    assert found.stages_stopped == 1
    assert found.stopping == Work(750 * 100, 7.5)


def test_a_stop_side_by_side_saves_the_controls_training_too():
    teacher = on_labels("10", "mlp-10")
    found = costs(result([teacher, distilled("10-4", "mlp-4", teacher, stopped=250, control="beside")]))
    assert found.controls == Work(3 * 250 * 40, 2.5)
    assert found.stopping == Work(750 * 100 + 750 * 3 * 40, 7.5 + 7.5)


def test_sharing_saves_what_each_chain_would_train_again():
    """Alone 2 + 3 + 3 models with 1 + 2 + 2 controls: 13 stages, of which 9 were trained."""
    found = costs(result(dskd_search()))
    again = 2 * 3 * 1000 * 100 + 2 * 3 * 1000 * 20  # the first teacher and the control of mlp-2 twice more
    assert found.stages_shared == 4
    assert found.sharing == Work(again, 4 * 11.0)


def test_an_exhaustive_search_over_three_candidates_shares_12_of_28_models():
    stages = [on_labels("10", "mlp-10")]
    for size in (8, 6, 4, 2):
        for above in [s for s in stages if s["members"].get("student", {}).get("model") != "mlp-2"]:
            stages.append(distilled(f"{above['key']}-{size}", f"mlp-{size}", above))
    assert len(stages) == 16
    assert costs(result(stages)).stages_shared == 28 - 16


def test_overhead_counts_each_control_once_and_is_measured_against_no_stop():
    with_stops = 3000 * (20 + 40 + 60 + 20 + 20) + 1000 * (100 + 25 + 100 + 40 + 60)
    without = 3000 * (20 + 40 + 60 + 20 + 20) + 1000 * (100 + 100 + 100 + 40 + 60)
    assert costs(result(dskd_search())).overhead == pytest.approx((with_stops + 3000 * 120) / without)


def test_overhead_of_a_control_side_by_side_is_its_training_less_what_stopped():
    teacher = on_labels("10", "mlp-10")
    own = distilled("10-4", "mlp-4", teacher, stopped=250, control="beside")
    expected = (3000 * 40 + 250 * 100 + 750 * 40) / (3000 * 40 + 1000 * 100)
    assert costs(result([teacher, own])).overhead == pytest.approx(expected)


def test_the_clock_compares_chains_that_the_run_has_with_and_without_controllers():
    stages = dskd_search()
    plain = [distilled("plain-10-2", "mlp-2", stages[0]), distilled("plain-10-4", "mlp-4", stages[0])]
    plain.append(distilled("plain-10-4-2", "mlp-2", plain[1], seconds=40.0))
    found = costs(result([*plain, *stages]))
    with_them = 21.0 + 13.5 + 21.0 + 2 * 11.0  # 10-2, 10-4, 10-4-2 and the controls of mlp-2 and mlp-4
    assert found.clock == pytest.approx(with_them / (21.0 + 21.0 + 40.0))
    assert costs(result(stages)).clock is None


def test_sharing_with_controllers_is_compared_with_plain_chains_one_by_one():
    """10-2 and 10-4-2 alone train the teacher twice, which the chains with controllers train once."""
    stages = dskd_search()
    plain = [distilled("plain-10-2", "mlp-2", stages[0]), distilled("plain-10-4", "mlp-4", stages[0])]
    plain.append(distilled("plain-10-4-2", "mlp-2", plain[1], seconds=40.0))
    found = costs(result([*plain, *stages]))
    once = (on_labels("10", "mlp-10"), *(s for s in stages if s["key"] in ("10-2", "10-4", "10-4-2")))
    controls = [s for s in stages if s["key"] in ("control-2", "control-4")]
    assert found.guided.flops == sum(sum(s["flops"].values()) for s in (*once, *controls))
    assert found.guided.seconds == pytest.approx(11.0 + 21.0 + 13.5 + 21.0 + 2 * 11.0)
    flops = 2 * 3000 * 100 + 3000 * 20 + 1000 * 100 + 3000 * 40 + 1000 * 100 + 3000 * 20 + 1000 * 40
    assert found.plain_alone.flops == flops
    assert found.plain_alone.seconds == pytest.approx(2 * 11.0 + 21.0 + 21.0 + 40.0)
    assert (costs(result(stages)).guided, costs(result(stages)).plain_alone) == (Work(), Work())


def test_runs_without_teachers_and_models_without_flops_cost_what_they_cost():
    generator = {**member("mlp-2"), "flops": None}
    players = stage("g", {"a": generator, "b": member("mlp-2")}, {"a": 10, "b": 10})
    found = costs(result([players]))
    assert found.students == Work(3 * 10 * 20, 0.2)
    assert (found.overhead, found.clock, found.sharing, found.stopping) == (None, None, Work(), Work())
    assert costs({**result([players]), "stages": []}).total == Work()


@st.composite
def runs(draw):
    """Any tree of distilled stages with any stops and controls."""
    sizes = (8, 6, 4, 2)
    stages = [on_labels("t", "mlp-10")]
    controls = {n: on_labels(f"c{n}", f"mlp-{n}", "control", seconds=draw(st.floats(10, 99))) for n in sizes}
    for i in range(draw(st.integers(1, 8))):
        size, above = draw(st.sampled_from(sizes)), draw(st.sampled_from(stages))
        stopped = draw(st.none() | st.integers(1, IMAGES))
        control = draw(st.sampled_from(["", "beside", f"c{size}"]))
        stages.append(distilled(f"s{i}", f"mlp-{size}", above, stopped, control, reused=draw(st.booleans())))
    used = {ref["stage"] for s in stages for ref in s["uses"].values()}
    return result([*(c for c in controls.values() if c["key"] in used), *stages])


@given(runs())
def test_roles_add_up_to_the_total_and_nothing_saved_is_negative(run):
    found, stages = costs(run), run["stages"]
    assert sum(getattr(found, role).flops for role in ROLES) == sum(sum(s["flops"].values()) for s in stages)
    assert found.total.seconds == pytest.approx(sum(s["seconds"] for s in stages))
    assert found.trained + found.reused == len(stages)
    assert min(found.stopping.flops, found.stopping.seconds, found.sharing.flops, found.sharing.seconds) >= 0
    assert found.stages_shared >= 0
    assert found.rest >= 0
    stopped = any(s["events"] for s in stages)
    assert stopped or found.stopping == Work()


@pytest.mark.parametrize("mode", ["shared", "side-by-side"])
def test_a_real_stop_saves_exactly_the_passes_that_did_not_happen(tmp_path, mode):
    controller = {"name": "dskd", "patience": 1, "mode": mode}
    slow = {"loss": "kd", "weight": 0.0001}  # hardly better than labels alone, so the control is soon as good
    recipe = {**RECIPE, "controller": [controller], "objective": [{"loss": "cross_entropy", "weight": 0.0}, slow]}
    run = make_run(tmp_path, recipe=recipe, sets=["train.epochs=3"]).execute()
    first, *_, own = run["stages"]
    (at,) = {event["step"] for event in own["events"]}
    images = first["flops"]["teacher"] // (3 * first["members"]["teacher"]["flops"])
    left = images - own["flops"]["teacher"] // own["members"]["teacher"]["flops"]
    assert 0 < at < own["steps"]
    assert left == images * (own["steps"] - at) // own["steps"]  # whole epochs are left
    learned = own["members"]["student"]["flops"] * 3 * left * (mode == "side-by-side")
    found = costs(run)
    assert found.stopping.flops == left * own["members"]["teacher"]["flops"] + learned
    assert found.stopping.seconds > 0
    assert found.total.flops == sum(sum(stage["flops"].values()) for stage in run["stages"])
    assert found.rest > 0
