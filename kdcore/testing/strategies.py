"""Hypothesis strategies for what losses and plans take.

::

    from hypothesis import given
    from kdcore.testing.strategies import labels, logits

    @given(logits(rows=8, classes=5), labels(rows=8, classes=5))
    def test_my_loss_is_not_negative(student, target):
        assert my_loss(student, target) >= 0

Needs hypothesis (``pip install hypothesis``), which kdcore itself does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..plan import Member, ModelRef, OptimizerSpec, SourceSpec, Spec, Stage, Term

__all__ = ["labels", "logits", "plans"]

Sizes: TypeAlias = "int | st.SearchStrategy[int]"
"""A size, or a strategy for it."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALES = (1e-4, 1.0, 30.0, 1e4)


def _drawn(draw: st.DrawFn, size: Sizes) -> int:
    return size if isinstance(size, int) else draw(size)


@st.composite
def logits(
    draw: st.DrawFn,
    rows: Sizes = st.integers(1, 8),  # noqa: B008 - a strategy is a value
    classes: Sizes = st.integers(2, 12),  # noqa: B008
    *,
    dtypes: Sequence[torch.dtype] = DTYPES[:2],
    scales: Sequence[float] = SCALES,
    masked: bool = False,
) -> Tensor:
    """[B, C] logits: random, with ties, or with constant columns.

    Args:
        draw: given by hypothesis.
        rows: B.
        classes: C.
        dtypes: to draw from, e.g. ``[torch.float16]``.
        scales: to draw the standard deviation from; up to 1e4 stays finite in float16.
        masked: also draws -inf, in whole columns and at least one class short of all.
    """
    shape = _drawn(draw, rows), _drawn(draw, classes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64).clamp(-6, 6) * draw(st.sampled_from(scales))
    kind = draw(st.sampled_from(["random", "ties", "constant columns", "equal"]))
    if kind == "ties":
        values[:, -1] = values[:, 0]
    elif kind == "constant columns":
        constant = draw(st.integers(1, shape[1]))
        values[:, :constant] = values[0, :constant].clone()
    elif kind == "equal":
        values[:] = values[0, 0]
    if masked:
        values[:, draw(st.lists(st.integers(0, shape[1] - 1), max_size=shape[1] - 1, unique=True))] = -torch.inf
    return values.to(draw(st.sampled_from(dtypes)))


@st.composite
def labels(
    draw: st.DrawFn,
    rows: Sizes = st.integers(1, 8),  # noqa: B008
    classes: Sizes = st.integers(2, 12),  # noqa: B008
    *,
    ignore_index: int | None = None,
) -> Tensor:
    """[B] int64 labels from 0 to C - 1.

    Args:
        draw: given by hypothesis.
        rows: B.
        classes: C.
        ignore_index: a label that some rows, or all, have instead.
    """
    count, number = _drawn(draw, rows), _drawn(draw, classes)
    one = st.integers(0, number - 1)
    if ignore_index is not None:
        one = one | st.just(ignore_index)
    return torch.tensor(draw(st.lists(one, min_size=count, max_size=count)), dtype=torch.int64)


MODELS = (ModelRef("mlp", {"size": 1}), ModelRef("mlp", {"size": 2}), ModelRef("cnn", {"size": 2}))
LABELS = Term("cross_entropy", None, options={"label_smoothing": 0.0})


@st.composite
def plans(draw: st.DrawFn, *, longest: int = 4) -> list[Stage]:
    """Sound stages, inputs first, as a strategy may ask for them.

    Each trains one or two members on digits: on labels, or as a student of a member of an earlier stage. Names are not
    unique, and equal stages may occur twice.

    Args:
        draw: given by hypothesis.
        longest: the largest number of stages, from 1.
    """
    stages: list[Stage] = []
    for number in range(draw(st.integers(1, longest))):
        stages.append(draw(_stages(stages, number)))
    return stages


@st.composite
def _stages(draw: st.DrawFn, before: Sequence[Stage], number: int) -> Stage:
    members: dict[str, Member] = {}
    taught = draw(st.none() | st.sampled_from(before)) if before else None
    if taught is not None:
        teacher = taught[draw(st.sampled_from(sorted(taught.members)))]
        assert isinstance(teacher.stage, Stage)
        members["teacher"] = Member(teacher.stage.members[teacher.member].model, init=teacher)
        options = {"temperature": draw(st.sampled_from([1.0, 4.0])), "normalize": "none", "eps": None}
        members["student"] = draw(_learners((LABELS, Term("kd", options=options))))
    else:
        members["teacher"] = draw(_learners((LABELS,)))
        if draw(st.booleans()):
            members["other"] = draw(_learners((LABELS,)))
    batch_size = draw(st.sampled_from([64, 128]))
    data = SourceSpec(Spec("digits"), batch_size)
    length, seed, best = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.booleans())
    return Stage(f"stage {number}", members, data, length, seed=seed, keep="best" if best else "last")


@st.composite
def _learners(draw: st.DrawFn, terms: tuple[Term, ...]) -> Member:
    rate = draw(st.sampled_from([0.01, 0.05]))
    return Member(draw(st.sampled_from(MODELS)), terms=terms, optimizer=OptimizerSpec(lr=rate))
