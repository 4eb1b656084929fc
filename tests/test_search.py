"""The search for assistants, driven by scripted accuracies: every mode through good, flat, failing and tied cases."""

from __future__ import annotations

import dataclasses
import math

import pytest
from scripted import drive, dskd_view, images, path_of, view

from kdcore import Choice, ModelCost, ModelRef, paired_difference

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
    assert found.texts[1] == "10-4-2 instead of 10-2: +10.00 points"
    assert found.texts[2] == "10-4-2 is delivered, the next best is 10-6-2: +1.00 points"


def test_a_margin_within_one_standard_error_is_marked_as_noise():
    other = bytes([0] * 5 + [1] * 51 + [0] * 44)  # one right image more, eleven that differ
    found = drive({(10, 2): images(50), (10, 4, 2): other}, candidates=(4,))
    assert found.choices[1].is_noise
    assert found.texts[1] == "10-4-2 instead of 10-2: +1.00 points"


def test_a_margin_of_exactly_one_standard_error_is_noise():
    """As it is whenever one of two seeds makes no difference; both are sums of floats, which differ in last digits."""
    worth = {((10, 4, 2), 0): images(18, 59)}
    found = drive(lambda stage: worth.get((path_of(stage), stage.seed), images(17, 59)), candidates=(4,), seeds=2)
    choice = found.choices[1]
    assert choice.margin == pytest.approx(choice.error)
    assert choice.is_noise


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
