"""Whether a learner is better than another: the standard error against what it is defined to be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcore import MemberResult, ResultRef, paired_difference

RIGHT = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def member(right: Sequence[bool], accuracy: float | None = None) -> MemberResult:
    share = sum(right) / len(right) if accuracy is None else accuracy
    return MemberResult(ResultRef("0" * 64, "student"), share, share, (), 1, 1, bytes(map(int, right)))


@given(RIGHT)
def test_with_one_seed_it_is_mcnemars(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    found = paired_difference([member(ours)], [member(theirs)])
    b, c = (sum(x > y for x, y in pairs), sum(x < y for x, y in pairs))
    assert found.mean == pytest.approx((b - c) / len(pairs))
    assert found.error == pytest.approx(math.sqrt(b + c - (b - c) ** 2 / len(pairs)) / len(pairs), abs=1e-12)


@given(st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=9, max_size=9), min_size=1, max_size=4))
def test_swapping_both_negates_the_mean_and_keeps_the_error(runs: list[list[tuple[bool, bool]]]) -> None:
    ours = [member([a for a, _ in run]) for run in runs]
    theirs = [member([b for _, b in run]) for run in runs]
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there.mean == pytest.approx(-back.mean)
    assert there.error == pytest.approx(back.error)


@given(RIGHT, st.integers(2, 4))
def test_a_repeated_seed_says_nothing_about_seeds(pairs: list[tuple[bool, bool]], times: int) -> None:
    ours, theirs = zip(*pairs, strict=True)
    once = paired_difference([member(ours)], [member(theirs)])
    often = paired_difference([member(ours)] * times, [member(theirs)] * times)
    assert often.error == pytest.approx(once.error)


def test_the_error_is_the_spread_of_the_mean_over_seeds_and_images() -> None:
    """Drawn again and again from a model with effects of seed, of image and of both."""
    generator, means, errors = np.random.default_rng(0), [], []
    for _ in range(300):
        seed, image = generator.normal(0, 0.1, (4, 1)), generator.normal(0, 0.3, (1, 80))
        share = np.clip(0.5 + seed + image, 0, 1)
        right = generator.random((4, 80)) < share
        wrong = generator.random((4, 80)) < 0.5
        found = paired_difference([member(list(row)) for row in right], [member(list(row)) for row in wrong])
        means.append(found.mean)
        errors.append(found.error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.1)


def test_without_the_images_there_is_no_error() -> None:
    found = paired_difference([member([], 0.75)], [member([], 0.5)])
    assert (found.mean, found.error) == (0.25, None)
    assert paired_difference([member([True, False])], [member([True])]).error is None


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="2 results cannot be paired with 1"):
        paired_difference([member([True])] * 2, [member([True])])
