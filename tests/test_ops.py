"""The compiled ops as torch sees them, and the fast path around them."""

import itertools

import pytest
import torch
from op_samples import (
    COMMON,
    DTYPES,
    MODES,
    NUMBERS,
    both_losses,
    ops,
    sample,
)

from kdcore.losses import dkd_loss
from kdcore.losses._ops import numbers_tensor

pytestmark = pytest.mark.usefixtures("compiled_op")


def statistics(student, teacher, index):
    stats = []
    for z in (student, teacher):
        count, mean, m2 = ops.col_stats(z.detach(), index, -100)
        stats += [mean, m2 / count.clamp(min=1)]
    return torch.stack(stats)


def arguments(student, teacher, index, row_beta=None, stats=None, **change):
    return (student, teacher, index, row_beta, stats, *{**COMMON, **change}.values())


# the registrations


def cases():
    for mode, dtype, strided in itertools.product(range(3), DTYPES, (False, True)):
        name = f"{MODES[mode]}-{dtype}".replace("torch.", "") + ("-strided" if strided else "")
        yield pytest.param({"dtype": dtype, "strided": strided}, {"normalize": mode}, id=name)
    kd = {"decoupled": False, "ce_weight": 0.0, "cross_entropy": False}
    yield pytest.param({}, kd, id="kd")
    yield pytest.param({}, {**kd, "index": None, "normalize": 0}, id="kd-unlabelled")
    yield pytest.param({"classes": 2}, {}, id="two-classes")
    yield pytest.param({}, {"row_beta": torch.linspace(0, 3, 6)}, id="beta-by-row")
    yield pytest.param({}, {"given": True, "through": False}, id="given-statistics")
    yield pytest.param({"rows": 1}, {"normalize": 0}, id="one-row")
    yield pytest.param({"rows": 0}, {}, id="no-row")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(("shape", "change"), list(cases()))
def test_every_op_is_registered_as_it_behaves(shape, change):
    change = dict(change)
    student, teacher, index = sample(**shape)
    index, row_beta, given = (
        change.pop(name, default) for name, default in (("index", index), ("row_beta", None), ("given", False))
    )
    stats = statistics(student, teacher, index) if change.get("normalize", 1) == 1 else None
    student.requires_grad_()
    split = arguments(student, teacher, index, row_beta, stats, **change)
    weights = torch.linspace(0.5, 2, len(student), dtype=ops.forward(*split)[0].dtype)
    calls = [
        (ops.col_stats, student, index, -100),
        (ops.fused, *arguments(student, teacher, index, row_beta, stats if given else None, **change), True, True),
        (ops.forward, *split),
        (ops.backward, weights, student.detach(), *split[1:], None, None),  # its derivative is an error
    ]
    if stats is not None and not given:
        sums = ops.sums(weights, *split).detach()
        calls += [
            (ops.sums, weights, *split),
            (ops.backward, weights, student.detach(), *split[1:], sums, torch.tensor(5, dtype=weights.dtype)),
        ]
    for op, *args in calls:
        torch.library.opcheck(op, tuple(args))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["fused", "forward", "backward"])
@pytest.mark.parametrize("flags", [(True, True), (False, False)])
def test_an_op_with_its_numbers_in_a_tensor_is_the_op(name, flags):
    student, teacher, index = sample()
    args = arguments(
        student.requires_grad_(name != "backward"), teacher, index, None, statistics(student, teacher, index)
    )
    before = (torch.linspace(1, 2, 6),) if name == "backward" else ()
    after = {"fused": flags, "forward": (), "backward": (None, None)}[name]
    dynamic = (*args[:5], numbers_tensor(args[5 : 5 + NUMBERS]), *args[5 + NUMBERS :])
    args, dynamic = (*before, *args, *after), (*before, *dynamic, *after)
    expected, found = getattr(ops, name)(*args), getattr(ops, f"{name}_dynamic")(*dynamic)
    for one, other in zip(flat(expected), flat(found), strict=True):
        assert torch.equal(one, other)
    torch.library.opcheck(getattr(ops, f"{name}_dynamic"), dynamic)


def flat(result):
    return result if isinstance(result, tuple) else (result,)


@both_losses
def test_values_and_gradients_of_the_phases_are_those_of_the_fused_op(loss):
    student, teacher, index = sample(dtype=torch.float64)
    change = {"decoupled": loss is dkd_loss}
    stats = statistics(student, teacher, index)
    whole, parts, grad = ops.fused(*arguments(student, teacher, index, **change), True, True)
    args = arguments(student, teacher, index, None, stats, **change)
    rows, each = ops.forward(*args)
    weights = torch.full_like(rows, 1 / 5)
    torch.testing.assert_close(rows.sum() / 5, whole)
    torch.testing.assert_close(each.sum(1) / 5, parts)
    torch.testing.assert_close(ops.backward(weights, *args, None, None), grad)


def test_halves_that_share_statistics_and_sums_give_the_gradient_of_the_whole():
    student, teacher, index = sample(8, dtype=torch.float64)
    stats = statistics(student, teacher, index)
    weights = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    whole = ops.backward(weights, *arguments(student, teacher, index, None, stats), None, None)
    halves = [slice(3), slice(3, None)]
    calls = [(weights[h], *arguments(student[h], teacher[h], index[h], None, stats)) for h in halves]
    sums = sum(ops.sums(*call) for call in calls)
    count = sum(ops.col_stats(student[h], index[h], -100)[0] for h in halves)
    found = [ops.backward(*call, sums, count) for call in calls]
    torch.testing.assert_close(torch.cat(found), whole)


# what the raw ops refuse


@pytest.mark.parametrize("label", [5, -1, 2**62])
def test_a_label_outside_the_classes_is_an_index_error_in_every_op(label):
    student, teacher, index = sample()
    stats = statistics(student, teacher, index)
    index[3] = label
    args = arguments(student, teacher, index, None, stats)
    for call in (
        lambda: ops.col_stats(student, index, -100),
        lambda: ops.fused(*args, True, True),
        lambda: ops.forward(*args),
        lambda: ops.sums(torch.ones(6), *args),
        lambda: ops.backward(torch.ones(6), *args, None, None),
    ):
        with pytest.raises(IndexError, match=f"{label} is outside the 5 classes"):
            call()


REFUSED = {
    "other shape": lambda s, t, y: arguments(s, t[:, :3], y),
    "other dtype": lambda s, t, y: arguments(s, t.double(), y),
    "one class": lambda s, t, y: arguments(s[:, :1], t[:, :1], y),
    "integers": lambda s, t, y: arguments(s.long(), t.long(), y),
    "one dimension": lambda s, t, y: arguments(s[0], t[0], y),
    "labels of another length": lambda s, t, y: arguments(s, t, y[:3]),
    "labels of another dtype": lambda s, t, y: arguments(s, t, y.int()),
    "no labels": lambda s, t, y: arguments(s, t, None),
    "statistics of other classes": lambda s, t, y: arguments(s, t, y, None, torch.ones(4, 4)),
    "statistics without classes": lambda s, t, y: arguments(s, t, y, None, torch.ones(4, 5), normalize=0),
    "beta of other rows": lambda s, t, y: arguments(s, t, y, torch.ones(5)),
    "normalize": lambda s, t, y: arguments(s, t, y, normalize=3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_raw_op_refuses_what_it_cannot_read(name):
    args = REFUSED[name](*sample())
    with pytest.raises(RuntimeError, match="kdcore"):
        ops.fused(*args, True, True)


def test_split_phases_need_statistics():
    args = arguments(*sample())
    for call in (lambda: ops.forward(*args), lambda: ops.backward(torch.ones(6), *args, None, None)):
        with pytest.raises(RuntimeError, match="needs stats"):
            call()


@pytest.mark.parametrize("name", ["teacher", "row_beta", "stats"])
@pytest.mark.parametrize("op", ["fused", "forward"])
def test_a_raw_op_refuses_to_drop_a_gradient(name, op):
    student, teacher, index = sample()
    tensors = {"teacher": teacher, "row_beta": torch.ones(6), "stats": statistics(student, teacher, index)}
    tensors[name].requires_grad_()
    args = arguments(student.requires_grad_(), tensors["teacher"], index, tensors["row_beta"], tensors["stats"])
    after = (True, True) if op == "fused" else ()
    with pytest.raises(RuntimeError, match=rf'Pass {name}.detach\(\).*backend="reference"'):
        getattr(ops, op)(*args, *after)
    with torch.no_grad():
        getattr(ops, op)(*args, *after)


def test_a_raw_op_without_its_gradient_gives_a_loss_without_a_graph():
    student, teacher, index = sample()
    loss, parts, grad = ops.fused(*arguments(student.requires_grad_(), teacher, index), True, False)
    assert not any(part.requires_grad for part in (loss, parts, grad))
    assert grad.shape == (0,)
