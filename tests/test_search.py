"""The search for assistants, driven by scripted accuracies: every mode through good, flat, failing and tied cases."""

from __future__ import annotations

import dataclasses
import math

import pytest
from scripted import by_path, drive, dskd_view, images, path_of, view

from kdcore import Choice, ModelCost, ModelRef, RecipeError, paired_difference

NAN = math.nan
GOOD = {(10, 2): 0.5, (10, 4, 2): 0.6, (10, 6, 2): 0.61, (10, 8, 2): 0.55, (10, 8, 6, 2): 0.7}


def request_of(found, number):
    return [path_of(stage) for stage in found.asked[number]]


# ---------------------------------------------------------------- greedy


def test_greedy_asks_for_the_direct_student_first_and_for_each_round_at_once_in_increasing_order():
    found = drive(GOOD, candidates=(8, 4, 6))
    assert request_of(found, 0) == [(10,), (10, 2)]
    assert request_of(found, 1) == [(10, 4), (10, 4, 2), (10, 6), (10, 6, 2), (10, 8), (10, 8, 2)]
    assert request_of(found, 2) == [(10, 8, 6), (10, 8, 6, 2)]  # next to the teacher; 10-8 is there
    assert len(found.asked) == 3


def test_greedy_keeps_an_assistant_while_the_student_is_not_worse():
    found = drive(GOOD)
    assert found.chosen == (10, 8, 6, 2)
    assert found.texts[:3] == [
        "10-2, the direct student: 50.00% on the monitor split",
        "10-6-2 instead of 10-2: +11.00 points",
        "10-8-6-2 instead of 10-6-2: +9.00 points",
    ]


def test_greedy_stops_when_every_candidate_makes_the_student_worse():
    found = drive({(10, 2): 0.8, (10, 6, 2): 0.7})
    assert found.chosen == (10, 2)
    assert len(found.asked) == 2
    assert "10-2 stays, not 10-6-2: +10.00 points" in found.texts


def test_on_flat_results_greedy_keeps_every_assistant_the_smallest_first():
    found = drive({})
    assert [request[0] for request in found.students()] == [(10, 2), (10, 4, 2), (10, 6, 4, 2), (10, 8, 6, 4, 2)]
    assert found.chosen == (10, 8, 6, 4, 2)


def test_of_equally_good_candidates_greedy_keeps_the_smaller():
    found = drive({(10, 2): 0.5, (10, 8, 2): 0.9, (10, 6, 2): 0.9}, assistants=1)
    assert found.chosen == (10, 6, 2)


def test_without_any_accuracy_the_direct_student_is_delivered():
    found = drive(lambda stage: NAN)
    assert found.chosen == (10, 2)
    assert len(found.asked) == 2
    assert all(choice.margin is None for choice in found.choices)
    assert "no accuracy" in found.outcome.note


def test_any_accuracy_is_better_than_none():
    assert drive({(10, 2): NAN, (10, 4, 2): 0.1, (10, 6, 2): NAN, (10, 8, 2): NAN}, assistants=1).chosen == (10, 4, 2)


def test_at_most_so_many_assistants():
    found = drive({}, assistants=2)
    assert found.chosen == (10, 6, 4, 2)
    assert max(len(path_of(stage)) for stage in found.stages) == 4


def test_the_order_in_which_candidates_are_written_changes_nothing():
    first, second = (drive(GOOD, candidates=sizes, mode="exhaustive") for sizes in ((4, 6, 8), (8, 6, 4)))
    assert first.identities == second.identities
    assert first.texts == second.texts


# ---------------------------------------------------------------- beam and exhaustive


def test_a_beam_finds_what_greedy_passes_by():
    table = {(12, 4, 2): 0.7, (12, 6, 2): 0.69, (12, 10, 6, 2): 0.9}
    options = {"run": view(12), "candidates": (4, 6, 10)}
    assert drive(table, **options).chosen == (12, 4, 2)
    found = drive(table, mode="beam", **options)
    assert found.chosen == (12, 10, 6, 2)
    assert found.students()[2] == [(12, 6, 4, 2), (12, 10, 4, 2), (12, 10, 6, 2)]


def test_a_beam_compares_each_chain_with_its_own_parent():
    table = {(10, 4, 2): 0.9, (10, 6, 2): 0.6, (10, 8, 4, 2): 0.8, (10, 8, 6, 2): 0.65}
    found = drive(table, mode="beam")
    assert "10-8-6-2 instead of 10-6-2: +5.00 points" in found.texts
    assert not any("10-8-4-2 instead" in text for text in found.texts)  # better than that, but worse than 10-4-2
    assert found.chosen == (10, 4, 2)


def test_a_beam_keeps_the_longest_of_equally_good_chains():
    assert drive({}, mode="beam").chosen == (10, 8, 6, 4, 2)


def test_exhaustive_trains_every_subset_once_level_by_level():
    found = drive({}, mode="exhaustive", run=dskd_view())
    assert [len(level) for level in found.students()] == [1, 3, 3, 1]
    learners = [stage for stage in found.stages if {"student", "teacher"} & set(stage.members)]
    controls = [stage for stage in found.stages if "control" in stage.members]
    assert len(learners) == len(set(map(path_of, learners))) == 16
    assert sorted(map(path_of, controls)) == [(2,), (4,), (6,), (8,)]
    expected = {"chains": 8, "chains_skipped": 0, "stages": 16, "stages_without_sharing": 28, "controls": 4}
    assert dict(found.outcome.evidence) == expected
    assert "16 stages were asked for, without sharing 28." in found.outcome.note


def test_exhaustive_gives_ties_to_the_smaller_chain():
    assert drive({}, mode="exhaustive").chosen == (10, 2)
    assert drive({(10, 6, 4, 2): 0.9, (10, 8, 2): 0.9}, mode="exhaustive").chosen == (10, 8, 2)
    assert drive({(10, 8, 6, 2): 0.9, (10, 8, 4, 2): 0.9}, mode="exhaustive").chosen == (10, 8, 4, 2)


def test_exhaustive_finds_a_chain_whose_parts_are_bad():
    table = {(10, 4, 2): 0.1, (10, 6, 2): 0.1, (10, 8, 2): 0.1, (10, 8, 6, 4, 2): 0.9}
    found = drive(table, mode="exhaustive")
    assert found.chosen == (10, 8, 6, 4, 2)
    assert found.texts[-1].startswith("10-8-6-4-2 is delivered, the next best is 10-2: +40.00 points")


def test_exhaustive_may_be_bounded():
    found = drive({}, mode="exhaustive", assistants=1)
    assert found.students() == [[(10, 2)], [(10, 4, 2), (10, 6, 2), (10, 8, 2)]]


# ---------------------------------------------------------------- sizes


def test_a_candidate_may_be_as_large_as_its_neighbours_where_that_is_allowed():
    found = drive({}, candidates=(2, 6, 10), allow_equal=True)
    assert found.students()[1] == [(10, 2, 2), (10, 6, 2), (10, 10, 2)]
    assert found.students()[2] == [(10, 2, 2, 2), (10, 6, 2, 2), (10, 10, 2, 2)]  # an assistant may follow itself
    assert found.chosen == (10, 2, 2, 2, 2)
    every = drive({}, candidates=(4, 6), allow_equal=True, mode="exhaustive").students()
    assert every == [[(10, 2)], [(10, 4, 2), (10, 6, 2)], [(10, 4, 4, 2), (10, 6, 4, 2), (10, 6, 6, 2)]]


DIVERSE = [{"model": "mlp", "size": 8}, {"model": "cnn", "size": 1}, {"model": "mlp", "size": 4}]
PARAMS = {"cnn-3": 900, "mlp-8": 500, "cnn-1": 300, "mlp-4": 300, "mlp-2": 100}
FLOPS = {"cnn-3": 9000, "cnn-1": 4000, "mlp-8": 1000, "mlp-4": 600, "mlp-2": 200}


def diverse():
    """A cnn teaches an mlp."""
    run = view(measure=lambda model: ModelCost(PARAMS[str(model)], FLOPS[str(model)]))
    return dataclasses.replace(run, teacher=ModelRef("cnn", {"size": 3}))


@pytest.mark.parametrize(
    ("order", "chain"),
    [
        ("parameters", "cnn-3 > mlp-8 > cnn-1 > mlp-2"),  # cnn-1 and mlp-4 are as large: not both
        ("flops", "cnn-3 > cnn-1 > mlp-8 > mlp-4 > mlp-2"),
    ],
)
def test_candidates_of_any_architecture_go_by_parameters_or_by_flops(order, chain):
    found = drive({}, run=diverse(), candidates=DIVERSE, order=order)
    assert next(iter(found.outcome.replicates)) == chain


def test_models_of_one_name_are_told_apart_by_their_options():
    wide, narrow = ({"model": "mlp", "size": 4, "width": width} for width in (64, 16))
    found = drive({}, candidates=[wide, narrow], mode="exhaustive")
    assert [*found.outcome.replicates] == [
        "mlp-10 > mlp-2",
        "mlp-10 > mlp-4 width=64 > mlp-2",
        "mlp-10 > mlp-4 width=16 > mlp-2",
    ]


# ---------------------------------------------------------------- seeds and noise


def test_every_chain_is_trained_under_every_seed_and_the_mean_decides():
    table = {(10, 4, 2): {3: 0.9, 4: 0.3}, (10, 6, 2): {3: 0.6, 4: 0.65}}
    run = view(seed=3)
    found = drive(lambda stage: table.get(path_of(stage), {}).get(stage.seed, 0.5), run=run, seeds=2, assistants=1)
    assert {(path_of(stage), stage.seed) for stage in found.asked[0]} == {
        ((10,), 3),
        ((10, 2), 3),
        ((10,), 4),
        ((10, 2), 4),
    }
    assert found.chosen == (10, 6, 2)  # 10-4-2 is best under seed 3 and worse on average
    refs = found.outcome.replicates["10-6-2"]
    assert [ref.stage.seed for ref in refs] == [3, 4]
    assert found.texts[0] == "10-2, the direct student: 50.00% on the monitor split, mean of 2 seeds"


def test_the_first_seeds_student_is_delivered_not_the_best_ones():
    found = drive(lambda stage: 0.5 + 0.1 * stage.seed + 0.01 * len(path_of(stage)), seeds=3)
    assert found.outcome.student == found.outcome.replicates["10-8-6-4-2"][0]
    assert found.outcome.student.stage.seed == found.outcome.teacher.stage.seed == 0
    assert {choice.best.stage.seed for choice in found.choices} == {0}
    assert "delivered is the first one's student" in found.outcome.note


def test_equal_numbers_of_right_images_are_a_tie_however_they_are_summed():
    shares = {(10, 2): (0.7, 0.8, 0.9), (10, 4, 2): (0.9, 0.7, 0.8), (10, 6, 2): (0.8, 0.9, 0.7)}
    found = drive(lambda stage: shares.get(path_of(stage), (0.1,) * 3)[stage.seed], seeds=3, assistants=1)
    assert found.chosen == (10, 4, 2)  # an assistant stays on a tie, the smaller of both


def test_a_decision_has_the_paired_margin_and_error_of_its_results():
    table = {(10, 2): images(50), (10, 4, 2): images(60), (10, 6, 2): images(59), (10, 8, 2): images(40)}
    found = drive(table, assistants=1)
    known = {path_of(result.stage): result["student"] for result in found.results if "student" in result.members}
    won = paired_difference([known[10, 4, 2]], [known[10, 2]])
    last = paired_difference([known[10, 4, 2]], [known[10, 6, 2]])
    assert [(c.margin, c.error) for c in found.choices[1:]] == [(won.mean, won.error), (last.mean, last.error)]
    assert found.texts[1] == "10-4-2 instead of 10-2: +10.00 points, standard error 3.00"
    assert found.texts[2] == "10-4-2 is delivered, the next best is 10-6-2: +1.00 points, standard error 0.99"


def test_a_margin_within_one_standard_error_is_marked_as_noise():
    other = bytes([0] * 5 + [1] * 51 + [0] * 44)  # one right image more, eleven that differ
    found = drive({(10, 2): images(50), (10, 4, 2): other}, candidates=(4,))
    assert found.choices[1].is_noise
    assert (
        found.texts[1] == "10-4-2 instead of 10-2: +1.00 points, standard error 3.32, within one standard error: noise"
    )


def test_over_seeds_the_error_knows_their_spread():
    right = {(10, 2): (50, 60), (10, 4, 2): (70, 55)}
    found = drive(lambda stage: images(right.get(path_of(stage), (0, 0))[stage.seed]), candidates=(4,), seeds=2)
    assert found.choices[1].margin == pytest.approx(0.075)
    assert found.choices[1].error > 0.1  # McNemar's alone would be 0.04


# ---------------------------------------------------------------- baseline


def test_a_baseline_trains_every_chain_without_controllers_and_decides_nothing():
    def script(stage):
        return 0.5 if stage.controllers else 0.9 - 0.1 * len(path_of(stage))

    plain = drive(script, run=dskd_view(), mode="exhaustive")
    found = drive(script, run=dskd_view(), mode="exhaustive", baseline=True)
    assert found.texts == plain.texts
    teachers = [stage for stage in found.stages if "teacher" in stage.members and "student" not in stage.members]
    without = [stage for stage in found.stages if "student" in stage.members and not stage.controllers]
    assert len(teachers) == 1  # shared
    assert len(without) == 15
    assert not any(stage.uses for stage in without)
    assert [*found.outcome.replicates][:9:8] == ["10-2", "10-2 without dskd"]
    assert len(found.outcome.replicates) == 16
    assert found.outcome.evidence["stages"] == 31
    assert found.outcome.evidence["stages_without_sharing"] == 56
    assert found.outcome.evidence["controls"] == 4


# ---------------------------------------------------------------- pruning


def test_a_weak_assistant_teaches_nobody():
    known = {(10, 4): images(90), (10, 6): images(30), (10, 8): images(72)}
    known |= {(10, 8, 4): images(90), (10, 8, 6): images(30)}
    found = drive(by_path(known, images(75)), mode="exhaustive", prune=2.0)
    asked = {path_of(stage) for stage in found.stages}
    assert (10, 6) in asked
    assert not {path for path in asked if path[:2] == (10, 6) and len(path) > 2}
    assert not {path for path in asked if path[:3] == (10, 8, 6) and len(path) > 3}
    assert (10, 8, 4, 2) in asked  # 10-8 is below its student, but by less than two standard errors
    assert "left out, they begin with a weak assistant: 10-6-2" in found.texts
    assert found.outcome.evidence["chains_skipped"] == 4
    assert "4 chains began with a weak assistant." in found.outcome.note


def test_without_standard_errors_nothing_is_pruned():
    assert len(drive({}, mode="exhaustive", prune=0.0).stages) == 16


def test_greedy_prunes_too():
    known = {(10, 8): images(10), (10, 8, 2): images(99)}
    found = drive(by_path(known, images(60)), prune=3.0)
    assert (10, 8, 2) not in {path_of(stage) for stage in found.stages}
    assert found.chosen == (10, 6, 4, 2)


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("mode", ["greedy", "beam", "exhaustive"])
def test_a_budget_of_stages_is_kept_and_the_best_so_far_is_delivered(mode):
    whole = drive(GOOD, mode=mode, run=dskd_view())
    for stages in range(3, len(whole.stages) + 1):
        found = drive(GOOD, mode=mode, run=dskd_view(), budget={"stages": stages})
        assert len(found.stages) <= stages
        assert set(found.identities) <= set(whole.identities)
        known = {path: GOOD.get(path, 0.5) for request in found.students() for path in request}
        assert GOOD.get(found.chosen, 0.5) == max(known.values())
    assert found.identities == whole.identities


def test_what_does_not_fit_is_said_and_a_later_chain_may_still_fit():
    run = view(estimate=lambda stage: 10**12 * (12 - path_of(stage)[-1]))  # the smaller, the dearer
    found = drive({}, run=run, mode="exhaustive", budget={"tflops": 27.0})
    assert found.students() == [[(10, 2)], [(10, 8, 2)]]
    assert "left out, they do not fit the budget: 10-4-2, 10-6-2" in found.texts
    assert found.outcome.evidence["chains_skipped"] == 6
    assert "6 chains did not fit the budget." in found.outcome.note


def test_a_budget_of_flops_holds_even_if_nothing_stops():
    run = view()
    for share in (0.3, 1.0):
        found = drive({}, run=run, share=share, mode="exhaustive", budget={"tflops": 400e-9})
        assert sum(result.flops for result in found.results) <= 400_000
    assert len(drive({}, share=0.3, budget={"tflops": 400e-9}).stages) > len(
        drive({}, budget={"tflops": 400e-9}).stages
    )


def test_a_budget_of_seconds_goes_by_the_seconds_of_a_flop_so_far():
    def seconds(stage):
        return view().estimate(stage) / 1000

    whole = sum(result.seconds for result in drive({}, seconds=seconds, mode="exhaustive").results)
    found = drive({}, seconds=seconds, mode="exhaustive", budget={"seconds": whole / 2})
    assert whole / 4 < sum(result.seconds for result in found.results) <= whole / 2


def test_the_direct_student_is_trained_even_if_its_seconds_are_the_whole_budget():
    found = drive({}, seconds=lambda stage: 100.0, budget={"seconds": 1.0})
    assert found.students() == [[(10, 2)]]
    assert found.outcome.evidence["chains_skipped"] == 3


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"stages": 2}, r"strategy\.budget\.stages: 2 is less than the direct student takes, 3\. Write more"),
        ({"tflops": 1e-9}, r"strategy\.budget\.tflops: 1e-09 is less than the direct student takes, 7\.2e-08\."),
    ],
)
def test_a_budget_that_does_not_pay_the_direct_student_is_an_error(budget, text):
    with pytest.raises(RecipeError, match=text):
        drive({}, run=dskd_view(), budget=budget)


def test_a_budget_counts_controls():
    run = dskd_view()
    found = drive({}, run=run, budget={"stages": 5})  # teacher, control, student; an assistant takes three more
    assert len(found.stages) == 3
    assert len(drive({}, run=run, budget={"stages": 6}).stages) == 6


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("candidates", "options", "text"),
    [
        (
            (4, 12),
            {},
            r"candidates\[1\]: mlp-12 has 12,000 parameters, not between mlp-2 \(2,000\) and mlp-10 \(10,000\)",
        ),
        ((10,), {}, r"candidates\[0\]: mlp-10 has .* Write a model whose size is between them, or allow_equal = true"),
        ((4, 2), {}, r"candidates\[1\]: mlp-2 has 2,000"),
        ((2, 1), {"allow_equal": True}, r"candidates\[1\]: mlp-1 has .* between them\.$"),
        ((11,), {"order": "flops"}, r"candidates\[0\]: mlp-11 has 11,000 FLOPs an image, not between"),
        ((4, 6, 4), {}, r"candidates\[2\]: mlp-4 is candidates\[0\] again\. Leave one of them out"),
        ((4,), {"baseline": True}, r"baseline: there is no controller to leave out\. Add a \[\[controller"),
        ((), {}, r"candidates: \[\] has 0 items"),
        ((4,), {"mode": "gredy"}, r"mode: 'gredy' is not"),
        ((4,), {"budget": {"stage": 3}}, r"budget\.stage: unknown key\. Did you mean 'stages'"),
        ((4,), {"seeds": 0}, r"seeds: 0 is below 1"),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_asked_for(candidates, options, text):
    with pytest.raises(RecipeError, match=rf"^strategy\.{text}"):
        drive({}, candidates=candidates, **options)


@pytest.mark.parametrize(("teacher", "allow_equal", "refused"), [(2, False, True), (2, True, False), (1, True, True)])
def test_a_teacher_that_is_not_larger_is_an_error(teacher, allow_equal, refused):
    run = view(teacher=teacher)
    if not refused:
        assert drive({}, run=run, candidates=(2,), allow_equal=allow_equal).chosen == (2, 2, 2)
        return
    with pytest.raises(
        RecipeError, match=rf"teacher: mlp-{teacher} has {teacher},000 parameters, the student mlp-2 has"
    ):
        drive({}, run=run, candidates=(2,), allow_equal=allow_equal)


def test_every_model_is_named_before_the_first_is_measured():
    named, model = [], view().model

    def measure(ref):
        assert len(named) == 3
        return ModelCost(1000 * ref.options["size"], 0)

    drive({}, run=view(model=lambda table: named.append(table) or model(table), measure=measure))
    assert len(named) == 3


# ---------------------------------------------------------------- what is asked for


def test_stages_are_called_by_their_chain_seed_and_variant():
    found = drive({}, run=dskd_view(), candidates=(4,), seeds=2, baseline=True)
    names = {stage.name for stage in found.stages if "student" in stage.members}
    assert {
        "10-4",
        "10-4-2",
        "10-4-2 (seed 1)",
        "10-4-2 (without controllers)",
        "10-4-2 (seed 1) (without controllers)",
    } <= names


def test_a_choice_names_what_would_be_delivered_if_the_run_ended_there():
    found = drive(GOOD, mode="exhaustive")
    best = [path_of(choice.best.stage) for choice in found.choices]
    assert best == [(10, 2), (10, 6, 2), (10, 8, 6, 2), (10, 8, 6, 2), (10, 8, 6, 2)]
    assert all(isinstance(choice, Choice) for choice in found.choices)
