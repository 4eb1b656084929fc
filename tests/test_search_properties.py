"""What holds of every search, whatever its candidates are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import drive, dskd_view, path_of, view

from kdcore import RecipeError

MODES = ("greedy", "beam", "exhaustive")
SIZES = st.lists(st.integers(3, 19), min_size=1, max_size=4, unique=True)
SHARES = st.sampled_from([0.3, 0.4, 0.5, 0.6, math.nan])
QUICK = settings(max_examples=40)


@st.composite
def searches(draw, modes=MODES):
    """Candidates between 2 and 20, what each learner is worth, and a mode."""
    shares = draw(st.lists(SHARES, min_size=7, max_size=31))
    sizes, mode, width = draw(SIZES), draw(st.sampled_from(modes)), draw(st.integers(1, 3))
    options = {"candidates": sizes, "mode": mode, "width": width, "assistants": draw(st.none() | st.integers(1, 4))}

    def worth(stage):
        seed, path = stage.seed, path_of(stage)
        return shares[(sum(path) * 7 + len(path) + 13 * seed + 5 * bool(stage.controllers)) % len(shares)]

    return worth, options


def run(controlled=False, **changes):
    return (dskd_view if controlled else view)(teacher=20, **changes)


def accuracy(worth, found) -> Mapping[tuple[int, ...], float]:
    """Of every chain's student; what is not a number is below all others."""
    shares = {path_of(s): worth(s) for s in found.stages if "student" in s.members and path_of(s)[-1] == 2}
    return {path: -1.0 if math.isnan(share) else share for path, share in shares.items()}


@QUICK
@given(searches())
def test_sizes_fall_from_teacher_to_student_and_assistants_stay_inside(search):
    worth, options = search
    for stage in drive(worth, run=run(), **options).stages:
        path = path_of(stage)
        assert path[0] == 20
        assert all(above > below for above, below in pairwise(path))
        assert path[-1] >= 2


@QUICK
@given(searches(modes=["greedy"]))
def test_greedy_keeps_an_assistant_only_if_the_student_did_not_get_worse(search):
    worth, options = search
    found = drive(worth, run=run(), **options)
    shares = accuracy(worth, found)
    before = (20, 2)
    for round_ in found.students()[1:]:
        assert {path[2:] for path in round_} == {before[1:]}  # inserted between the teacher and the one before
        best = max(shares[path] for path in round_)
        kept = next(path for path in sorted(round_) if shares[path] == best)  # a tie goes to the smaller
        if best < max(shares[before], 0):
            assert round_ == found.students()[-1]
            break
        before = kept
    assert found.chosen == before


@QUICK
@given(searches(modes=["beam", "exhaustive"]))
def test_the_outcome_is_the_best_of_what_was_trained_and_ties_go_as_the_mode_says(search):
    worth, options = search
    found = drive(worth, run=run(), **options)
    shares = accuracy(worth, found)
    assert shares[found.chosen] == max(shares.values())
    tied = [path for path, share in shares.items() if share == shares[found.chosen]]
    if options["mode"] == "exhaustive":
        assert sum(found.chosen) == min(map(sum, tied))


@QUICK
@given(searches(modes=["beam"]))
def test_a_beam_of_width_1_is_greedy(search):
    worth, options = search
    beam, greedy = (drive(worth, run=run(), **{**options, "mode": mode, "width": 1}) for mode in ("beam", "greedy"))
    assert beam.identities == greedy.identities
    assert beam.texts == greedy.texts
    assert beam.chosen == greedy.chosen


@settings(max_examples=25)
@given(SIZES, st.integers(1, 3), st.booleans(), st.booleans())
def test_exhaustive_asks_for_each_prefix_once_a_seed_and_variant(sizes, seeds, controlled, baseline):
    baseline = baseline and controlled
    options = {"mode": "exhaustive", "seeds": seeds, "baseline": baseline}
    found = drive(lambda stage: 0.5, run=run(controlled), candidates=sizes, **options)
    controls = [stage for stage in found.stages if "control" in stage.members]
    learners, prefixes = len(found.stages) - len(controls), 2 ** (len(sizes) + 1)
    assert learners == seeds * (2 * prefixes - 1 if baseline else prefixes)  # variants share the teacher
    assert len(controls) == (seeds * (len(sizes) + 1) if controlled else 0)
    assert len(set(found.identities)) == len(found.stages)
    assert len(found.outcome.replicates) == 2 ** len(sizes) * (2 if baseline else 1)


@QUICK
@given(searches(), st.integers(1, 40), st.floats(0.01, 1.0), st.booleans())
def test_budgets_of_stages_and_flops_hold(search, stages, share, controlled):
    worth, options = search
    options |= {"run": run(controlled), "share": share}
    flops = 9000 * stages
    direct = drive(worth, **{**options, "share": 1.0, "candidates": [3], "assistants": 1}).asked[0]
    pays = len(direct) <= stages, sum(map(run().estimate, direct)) <= flops
    limits = {"stages": stages}, {"tflops": flops / 1e12}
    for budget, enough in ((limits[0], pays[0]), (limits[1], pays[1]), (limits[0] | limits[1], all(pays))):
        if not enough:
            with pytest.raises(RecipeError, match="is less than the direct student takes"):
                drive(worth, budget=budget, **options)
            continue
        found = drive(worth, budget=budget, **options)
        assert "stages" not in budget or len(found.stages) <= stages
        assert "tflops" not in budget or sum(result.flops for result in found.results) <= flops


@QUICK
@given(searches(), st.floats(0.1, 10.0))
def test_a_budget_of_seconds_holds_where_seconds_go_with_flops(search, rate):
    worth, options = search
    direct = drive(worth, run=run(), **{**options, "candidates": [3], "assistants": 1})
    limit = 2 * sum(rate * result.flops for result in direct.results[:2])
    found = drive(worth, run=run(), seconds=lambda s: rate * run().estimate(s), budget={"seconds": limit}, **options)
    assert sum(result.seconds for result in found.results) <= limit * (1 + 1e-9)


@QUICK
@given(searches(), st.booleans())
def test_an_unlimited_budget_is_none(search, controlled):
    worth, options = search
    plain = drive(worth, run=run(controlled), **options)
    rich = drive(worth, run=run(controlled), budget={"stages": 10**6, "seconds": 1e12, "tflops": 1e12}, **options)
    assert rich.identities == plain.identities
    assert rich.texts == plain.texts
    assert rich.outcome.note.startswith(plain.outcome.note)


@QUICK
@given(searches(), st.integers(1, 3), st.booleans(), st.sampled_from([None, 0.0, 2.0]))
def test_a_search_depends_on_its_results_alone(search, seeds, baseline, prune):
    worth, options = search
    options = {**options, "seeds": seeds, "baseline": baseline, "prune": prune}
    first, second = (drive(worth, run=run(controlled=True), **options) for _ in range(2))
    assert first.identities == second.identities
    assert first.texts == second.texts
    assert first.outcome.note == second.outcome.note


@pytest.mark.parametrize("mode", MODES)
def test_a_search_among_equals_ends_and_shares_every_learner_with_a_student(mode):
    found = drive(lambda stage: 0.5, run=view(2, 2), candidates=(2,), allow_equal=True, mode=mode, assistants=5)
    assert list(map(len, map(path_of, found.stages))) == [1, 2, 3, 4, 5, 6, 7]  # the assistant is the student, too
