"""Whether one learner is better than another, by the images that each gets right: paired, since luck is shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import MemberResult

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies (shares) and its standard error; None where it is not known."""

    mean: float
    error: float | None


def paired_difference(ours: Sequence[MemberResult], theirs: Sequence[MemberResult]) -> Difference:
    """How much more accurate ``ours`` are than ``theirs`` on the monitor split.

    With one seed the error is McNemar's: of b images that only ours get right, c that only theirs do, and N in all,
    it is sqrt(b + c - (b - c)^2 / N) / N. With more, seeds and images are crossed random effects: the variance is that
    of the seeds' means over the number of seeds, plus that of the images' means over N, less that of what is left over,
    which both hold.

    Args:
        ours: a learner under one or more seeds.
        theirs: another under the same seeds, in the same order.

    Raises:
        ValueError: not as many of both, or none.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} results cannot be paired with {len(theirs)}")
    mean = math.fsum(a.accuracy - b.accuracy for a, b in zip(ours, theirs, strict=True)) / len(ours)
    sizes = {len(member.correct) for member in (*ours, *theirs)}
    if len(sizes) > 1 or sizes == {0}:
        return Difference(mean, None)
    return Difference(mean, _error(_right(ours) - _right(theirs)))


def _right(members: Sequence[MemberResult]) -> NDArray[float64]:
    """[seeds, images], 1 where the learner is right."""
    import numpy as np

    return np.stack([np.frombuffer(member.correct, np.uint8) for member in members]).astype(np.float64)


def _error(gained: NDArray[float64]) -> float:
    """Standard error of the mean of [seeds, images] under crossed random effects."""
    seeds, images = gained.shape
    by_image = gained.mean(axis=0)
    of_images = float(by_image.var()) / images
    if seeds == 1:
        return math.sqrt(of_images)
    by_seed = gained.mean(axis=1)
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    rest = gained - by_image - by_seed[:, None] + gained.mean()
    of_rest = float((rest**2).sum()) / ((seeds - 1) * max(images - 1, 1)) / (seeds * images)
    return math.sqrt(max(of_seeds + of_images - of_rest, of_seeds, of_images))
