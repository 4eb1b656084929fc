"""What a search leaves out and refuses: pruning, budgets, and recipes that do not fit."""

from __future__ import annotations

import pytest
from kdcore_search import Search
from kdcore_search.study import Study
from scripted import by_path, drive, dskd_view, images, path_of, table, view

from kdcore import ModelCost, RecipeError, Spec
from kdcore.cli.drive import planned

RISING = {(10, 2): 0.5, (10, 4, 2): 0.6, (10, 6, 2): 0.61, (10, 8, 2): 0.55, (10, 8, 6, 2): 0.7}

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
    weak = "left out, weak assistants: 10-6-2 (10-6 is 45.00 ± 4.97 points below the best student)"
    assert weak in found.texts
    alone = found.outcome.evidence["stages_without_sharing"]
    assert found.outcome.evidence["stages"] < alone == 2 + 3 + 3 + 4 + (1 + 1) + (1 + 1) + (2 + 1) + (2 + 1)
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
    whole = drive(RISING, mode=mode, run=dskd_view())
    for stages in range(3, len(whole.stages) + 1):
        found = drive(RISING, mode=mode, run=dskd_view(), budget={"stages": stages})
        assert len(found.stages) <= stages
        assert set(found.identities) <= set(whole.identities)
        known = {path: RISING.get(path, 0.5) for request in found.students() for path in request}
        assert RISING.get(found.chosen, 0.5) == max(known.values())
    assert found.identities == whole.identities


def test_what_does_not_fit_is_said_and_a_later_chain_may_still_fit():
    run = view(estimate=lambda stage: 10**12 * (12 - path_of(stage)[-1]))  # the smaller, the dearer
    found = drive({}, run=run, mode="exhaustive", budget={"tflops": 27.0})
    assert found.students() == [[(10, 2)], [(10, 8, 2)]]
    left = "left out, over the budget: 10-4-2 (with it 30 of 27 tflops), 10-6-2 (with it 28 of 27 tflops)"
    assert left in found.texts
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
        ((12,), {}, r"candidates\[0\]: mlp-12 has .* Write a model whose size is between them\.$"),
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


# ---------------------------------------------------------------- large searches


def test_what_pruning_compares_grows_with_the_chains_not_with_their_square(monkeypatch):
    calls, worth = [], Study.worth
    monkeypatch.setattr(Study, "worth", lambda study, chain: calls.append(chain) or worth(study, chain))
    often = {}
    for number in (4, 7):
        calls.clear()
        drive({}, candidates=range(3, 3 + number), run=view(20), mode="exhaustive", prune=2.0)
        often[number] = len(calls) / 2**number
    assert often[7] < 3 * often[4]


def test_a_search_of_a_thousand_stages_can_be_planned():
    options = Search.Options(candidates=[*map(table, range(3, 12))], mode="exhaustive")
    stages = planned(Search().plan(view(20), options), Spec("search"), lambda stage: 1)
    assert len(stages) == 2**10
