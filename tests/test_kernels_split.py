"""The phases of the op, between which ranks share statistics and sums: parts of a batch give what the batch gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from losses_table import COMPILED, DTYPES, EVERY_ISA, check_grad, check_value, exact, logits, needs_compiled, using

from kdcore.losses import dkd_loss, kd_loss

DEFAULTS = {
    "temperature": 4.0,
    "alpha": 1.0,
    "beta": 8.0,
    "kd_weight": 1.0,
    "ce_weight": 0.5,
    "label_smoothing": 0.0,
    "eps": 1e-5,
    "ignore_index": -100,
    "normalize": 1,
    "decoupled": True,
    "cross_entropy": True,
    "through": True,
}
wide = {"max_examples": 500, "deadline": None, "derandomize": False, "print_blob": True}
quick = settings(**wide, suppress_health_check=list(HealthCheck))
LENGTHS = [
    pytest.param(quick, id=""),
    pytest.param(settings(quick, max_examples=5000), id="long", marks=pytest.mark.long),
]


def common(student, teacher, index, row_beta=None, stats=None, **changes):
    """The arguments that every op takes, in their order."""
    return (student, teacher, index, row_beta, stats, *{**DEFAULTS, **changes}.values())


def merged(statistics):
    """Chan, Golub, LeVeque: count, mean and sum of squared deviations of parts, in any order and of any size."""
    count, mean, m2 = (part.double() for part in statistics[0])
    for more, other, spread in statistics[1:]:
        total = (count + more).clamp(min=1)
        step = other.double() - mean
        m2 = m2 + spread.double() + step.square() * count * more / total
        count, mean = count + more, mean + step * more / total
    return count, mean, m2


def split(z, cuts):
    return [z[start:end] for start, end in zip([0, *cuts], [*cuts, len(z)], strict=True)]


def by_ranks(student, teacher, index, cuts, weight, row_beta=None, ops=None, **kind):
    """Loss rows and gradient as several ranks compute them: statistics, forward, sums, backward."""
    ops = ops or torch.ops.kdcore
    acc = torch.promote_types(student.dtype, torch.float32)
    sides = [
        [ops.col_stats(part, y, -100) for part, y in zip(split(z, cuts), split(index, cuts), strict=True)]
        for z in (student, teacher)
    ]
    (count, mean_s, m2_s), (_, mean_t, m2_t) = map(merged, sides)
    rows = count.clamp(min=1)
    stats = torch.stack([mean_s, m2_s / rows, mean_t, m2_t / rows]).to(acc)
    betas = split(row_beta, cuts) if row_beta is not None else [None] * (len(cuts) + 1)
    ranks = [
        common(*rank, stats, **kind)
        for rank in zip(split(student, cuts), split(teacher, cuts), split(index, cuts), betas, strict=True)
    ]
    weights = split(weight, cuts)
    losses = [ops.forward(*rank)[0] for rank in ranks]
    sums = sum(ops.sums(w, *rank) for w, rank in zip(weights, ranks, strict=True))
    grads = [ops.backward(w, *rank, sums, count.to(acc)) for w, rank in zip(weights, ranks, strict=True)]
    return torch.cat(losses), torch.cat(grads), count


def whole(student, teacher, index, weight, row_beta=None, **kind):
    """The same by autograd through one batch, in float64."""
    decoupled = kind.get("decoupled", True)

    def function(s, t, y, return_parts, **settings):
        rows, parts = (dkd_loss if decoupled else kd_loss)(s, t, y, reduction="none", return_parts=True, **settings)
        return rows * weight.double(), parts

    beta = {"beta": 8.0 if row_beta is None else row_beta} if decoupled else {}
    settings_ = {"temperature": kind["temperature"], "normalize": "class", "ce_weight": 0.5, **beta}
    return exact(function, student, teacher, index, **settings_)


def check_ranks(student, teacher, index, cuts, weight, row_beta=None, **kind):
    rows, grad, count = by_ranks(student, teacher, index, cuts, weight, row_beta, **kind)
    truth = whole(student, teacher, index, weight, row_beta, **kind)
    assert count == (index != -100).sum()
    assert (grad[index == -100] == 0).all()
    check_value(student.dtype, rows * weight, truth.value, kind["temperature"])
    check_grad(grad, truth)


@pytest.mark.parametrize("profile", LENGTHS)
@needs_compiled
def test_any_cut_of_a_batch_with_shared_statistics_and_sums_is_one_batch(profile):
    numbers = st.integers(0, 2**32)

    def attempt(data, isa, dtype, rows, classes, seed):
        student, teacher, index = logits(rows, classes, dtype, seed % 2**20)
        generator = torch.Generator().manual_seed(seed)
        index[torch.rand(rows, generator=generator) < data.draw(st.sampled_from([0.0, 0.0, 0.3]))] = -100
        index[:4] = torch.arange(4) % classes  # of two rows h is +-1, and the gradient what is left of two sides
        cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=3)))  # a rank may have no row at all
        acc = torch.promote_types(dtype, torch.float32)
        weight = 0.5 + torch.rand(rows, generator=generator).to(acc)
        row_beta = data.draw(st.sampled_from([None, 8 * torch.rand(rows, generator=generator).to(acc)]))
        kind = {"decoupled": data.draw(st.booleans()), "temperature": data.draw(st.sampled_from([1.0, 4.0]))}
        with using(isa):
            check_ranks(student, teacher, index, cuts, weight, row_beta, **kind)

    drawn = {"isa": st.sampled_from(COMPILED), "dtype": st.sampled_from(DTYPES), "seed": numbers}
    profile(given(data=st.data(), rows=st.integers(4, 90), classes=st.integers(2, 140), **drawn)(attempt))()


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (7, 21), (41, 100), (300, 37), (9, 8200)], ids=str)
def test_col_stats_are_counts_means_and_sums_of_squares(isa, dtype, shape):
    student, _, index = logits(*shape, dtype)
    if shape[0] > 2:
        student[1] = float("nan")
        index[1] = -100
    rows = student[index != -100].double()
    with using(isa):
        count, mean, m2 = torch.ops.kdcore.col_stats(student, index, -100)
        assert torch.ops.kdcore.col_stats(student, None, -100)[0] == shape[0]
    assert count == len(rows)
    tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    assert count.dtype == mean.dtype == m2.dtype == torch.float64
    torch.testing.assert_close(mean, rows.mean(0), **tight)
    torch.testing.assert_close(m2, rows.var(0, correction=0) * len(rows), **tight)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("constant", [0.0, 1e4, 0.1])
@pytest.mark.parametrize("rows", [1, 7, 512, 1000])
def test_col_stats_of_a_constant_class_are_exact(isa, constant, rows):
    for dtype in DTYPES:
        z = torch.full((rows, 21), constant, dtype=dtype)
        with using(isa):
            _, mean, m2 = torch.ops.kdcore.col_stats(z, None, -100)
        assert torch.equal(mean, z[0].to(mean.dtype))
        assert (m2 == 0).all()


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_col_stats_of_no_row_are_zero(isa):
    with using(isa):
        for z, index in (
            (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)),
            (torch.ones(3, 5), torch.full((3,), -100)),
        ):
            count, mean, m2 = torch.ops.kdcore.col_stats(z, index, -100)
            assert count == 0
            assert (mean == 0).all()
            assert (m2 == 0).all()


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [True, False])
def test_fused_is_forward_and_backward(isa, dtype, mean):
    for shape, mode in (((40, 33), 0), ((40, 33), 1), ((40, 33), 2), ((5, 8200), 0), ((5, 8200), 2)):
        student, teacher, index = logits(*shape, dtype)
        index[3] = -100
        ops, stats = torch.ops.kdcore, None
        weight = torch.full(
            (shape[0],), 1 / (shape[0] - 1) if mean else 1.0, dtype=torch.promote_types(dtype, torch.float32)
        )
        with using(isa):
            if mode == 1:
                sides = [ops.col_stats(z, index, -100) for z in (student, teacher)]
                stats = torch.stack([x for n, m, m2 in sides for x in (m, m2 / n)])
            args = common(student, teacher, index, None, stats, normalize=mode, label_smoothing=0.1)
            loss, parts, grad = ops.fused(*args, mean, True)
            rows, row_parts = ops.forward(*args)
            back = ops.backward(weight, *args, None, None)
            assert torch.equal(ops.fused(*args, mean, False)[0], loss)
            assert ops.fused(*args, mean, False)[2].shape == (0,)
        close = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 0}
        torch.testing.assert_close((rows * weight).sum(), loss, **close)
        torch.testing.assert_close(row_parts.sum(1) / (shape[0] - 1), parts, **close)
        least = 6e-8 if dtype == torch.float16 else 0  # the statistics were rounded to be passed on
        atol = (1e-12 if dtype == torch.float64 else 5e-6) * grad.abs().max().item() + least
        torch.testing.assert_close(back, grad, rtol=2 * torch.finfo(dtype).eps, atol=atol)
        assert (rows[3], row_parts[:, 3].abs().sum(), back[3].abs().sum()) == (0, 0, 0)


CALLS = {
    "fused": lambda s, t, y: torch.ops.kdcore.fused(*common(s, t, y, normalize=0), True, True),
    "forward": lambda s, t, y: torch.ops.kdcore.forward(*common(s, t, y, normalize=0)),
    "backward": lambda s, t, y: torch.ops.kdcore.backward(s[:, 0], *common(s, t, y, normalize=0), None, None),
    "col_stats": lambda s, t, y: torch.ops.kdcore.col_stats(s, y, -100),
}


@needs_compiled
@pytest.mark.parametrize("op", CALLS)
def test_an_op_refuses_a_label_outside_the_classes(op):
    student, teacher, index = logits(4, 3)
    for label in (3, -1, 2**62):
        index[2] = label
        with pytest.raises(IndexError, match=f"label {label} is outside the 3 classes"):
            CALLS[op](student, teacher, index)
