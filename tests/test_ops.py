"""The compiled ops as torch sees them, and the fast path around them."""

import itertools
import os

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kdcore.losses import _fast, available_backends, compiled, dkd_loss, kd_loss
from kdcore.losses._extension import why_not
from kdcore.losses._ops import numbers_tensor

MODES = ("none", "class", "instance")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOSSES = {"kd": kd_loss, "dkd": dkd_loss}
COMMON = {
    "temperature": 4.0,
    "alpha": 1.0,
    "beta": 8.0,
    "kd_weight": 0.7,
    "ce_weight": 0.3,
    "label_smoothing": 0.1,
    "eps": 1e-5,
    "ignore_index": -100,
    "normalize": 1,
    "decoupled": True,
    "cross_entropy": True,
    "through": True,
}
NUMBERS = 7  # the first of them, in the order of the schemas
ops = torch.ops.kdcore

both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True, scope="module")
def compiled_op():
    if "cpu" not in available_backends():
        refuse = pytest.fail if os.environ.get("KDCORE_REQUIRE_EXT") == "1" else pytest.skip
        refuse(f"the compiled op is not there: {why_not('cpu')}")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sample(rows=6, classes=5, dtype=torch.float32, *, strided=False):
    """Student, teacher and labels, one of them to be left out."""
    width = classes + 3 if strided else classes
    student, teacher = (normal(rows, width, dtype=dtype, seed=seed)[:, :classes] for seed in (0, 1))
    if strided:
        teacher = teacher.t().contiguous().t()
    index = torch.arange(rows) % classes
    index[1:2] = -100
    return student, teacher, index


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


# the fast path


def gradient(value, student, **settings):
    return torch.autograd.grad(value.sum(), student, **settings)[0]


def fast(value):
    return type(value.grad_fn).__name__ == "_KnownGradientBackward"


USUAL = [
    {"normalize": mode, "reduction": reduction, "ce_weight": ce_weight}
    for mode, reduction, ce_weight in itertools.product(MODES, ("mean", "sum"), (0.0, 0.5))
] + [{"normalize": "class", "stats": "detached"}, {"temperature": 2, "kd_weight": 3, "label_smoothing": 0.1}]


@both_losses
@every_dtype
@pytest.mark.parametrize("settings", USUAL, ids=str)
def test_the_fast_path_is_the_registered_op_bit_for_bit(loss, dtype, settings, monkeypatch):
    student, teacher, index = sample(9, 7, dtype)
    student.requires_grad_()
    found = []
    for there_is in (True, False):
        monkeypatch.setattr(_fast, "there_is", there_is)
        value, parts = loss(student, teacher, index, **settings, return_parts=True)
        assert fast(value) == there_is
        grads = [gradient(factor * value, student, retain_graph=True) for factor in (1, 3)]
        assert all(grad.dtype == dtype for grad in grads)
        found.append((value, parts, grads, loss(student, teacher, index, **settings)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@both_losses
@pytest.mark.parametrize("settings", USUAL, ids=str)
def test_usual_calls_are_not_looked_at_twice(loss, settings, monkeypatch):
    student, teacher, index = sample()
    monkeypatch.setattr(compiled, "loss", None)
    for leaf in (student, student.requires_grad_(), torch.nn.Parameter(student.detach())):
        for parts in (False, True):
            loss(leaf, teacher, index, **settings, return_parts=parts)


def test_a_leaf_takes_over_the_gradient_that_the_op_wrote():
    student, teacher, index = sample()
    value = dkd_loss(student.requires_grad_(), teacher, index)
    written = value.grad_fn.saved_tensors[0].data_ptr()
    value.backward()
    assert student.grad.data_ptr() == written


def test_a_graph_that_is_kept_gives_its_gradient_again_and_one_that_is_not_says_so():
    student, teacher, index = sample()
    value = dkd_loss(student.requires_grad_(), teacher, index)
    value.backward(retain_graph=True)
    first = student.grad.clone()
    value.backward()
    assert torch.equal(student.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_gradients_of_float16_logits_survive_a_loss_scale():
    student, teacher, index = sample(dtype=torch.float16)
    student.requires_grad_()
    for reduction in ("mean", "none"):
        value = dkd_loss(student, teacher, index, kd_weight=1e-7, reduction=reduction).sum()
        exact = dkd_loss(student, teacher, index, kd_weight=1e-7, reduction=reduction, backend="reference").sum()
        found, expected = (gradient(2.0**16 * one, student).double() for one in (value, exact))
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-7)


@both_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_where_no_gradient_is_wanted_there_is_no_graph(loss, reduction):
    student, teacher, index = sample()
    plain = loss(student, teacher, index, reduction=reduction)
    student.requires_grad_()
    with torch.no_grad():
        quiet = loss(student, teacher, index, reduction=reduction)
    with torch.inference_mode():
        inferred = loss(student, teacher, index, reduction=reduction)
        rows = teacher.clone()
    for value in (plain, quiet, inferred):
        assert not value.requires_grad
        assert torch.equal(value, loss(student, teacher, index, reduction=reduction))
    loss(student, rows, index, reduction=reduction).sum().backward()  # a teacher computed in inference mode


@pytest.mark.parametrize("there_is", [True, False], ids=["fast", "registered"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_an_error_only_where_it_is_asked_for(there_is, reduction, monkeypatch):
    monkeypatch.setattr(_fast, "there_is", there_is)
    student, teacher, index = sample()
    student.requires_grad_()
    factor = torch.tensor(2.0, requires_grad=True)
    value = (factor * dkd_loss(student, teacher, index, reduction=reduction)).sum()
    plain = gradient(value, student, retain_graph=True)
    grad = gradient(value, student, create_graph=True)
    assert torch.equal(grad.detach(), plain)
    penalty = grad.square().sum()
    if reduction == "mean":  # the gradient is linear in what comes from above
        (slope,) = torch.autograd.grad(penalty, factor, retain_graph=True)
        torch.testing.assert_close(slope, penalty.detach())
    for total in (penalty, penalty + student.square().sum()):  # not left out in silence either
        with pytest.raises(RuntimeError, match=r'no second derivative.*backend="reference"'):
            torch.autograd.grad(total, student, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty.backward()


def test_many_gradients_at_once_are_those_of_the_loss():
    student, teacher, index = sample()
    value = dkd_loss(student.requires_grad_(), teacher, index)
    factors = torch.tensor([0.0, 1.0, 2.5])
    (grads,) = torch.autograd.grad(value, student, factors, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(grads, factors[:, None, None] * gradient(value, student))


# what is not for the fast path


def test_logits_that_are_a_lazy_negation_are_read_as_they_mean():
    student, teacher, index = sample()
    expected = kd_loss(-student, teacher, index)
    assert torch.equal(kd_loss(torch._neg_view(student), teacher, index), expected)
    assert torch.equal(kd_loss(-student, torch._neg_view(-teacher), index), expected)


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_mode_and_a_profiler_see_the_op():
    student, teacher, index = sample()
    expected = dkd_loss(student.requires_grad_(), teacher, index)
    with Watch() as watch:
        assert dkd_loss(student, teacher, index) == expected
    assert "kdcore.fused.default" in watch.seen
    with torch.autograd.profiler.profile() as profile:
        assert dkd_loss(student, teacher, index) == expected
    assert "kdcore::fused" in {event.name for event in profile.function_events}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of shapes that are looked at
def test_a_tracer_sees_the_op():
    student, teacher, index = sample()
    traced = torch.jit.trace(lambda s, t: dkd_loss(s, t, index, normalize="class"), (student, teacher))
    assert "kdcore::fused" in str(traced.graph)
    assert torch.equal(traced(2 * student, teacher), dkd_loss(2 * student, teacher, index, normalize="class"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_checkpoint_computes_the_loss_again(reduction):
    student, teacher, index = sample()
    student.requires_grad_()

    def function(s):
        return dkd_loss(2 * s, teacher, index, normalize="class", reduction=reduction)

    found = checkpoint(function, student, use_reentrant=False)
    assert torch.equal(gradient(found, student), gradient(function(student), student))


class Logits(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func.jvp's own
@both_losses
@every_mode
def test_transforms_forward_mode_and_subclasses_go_to_the_reference(loss, mode):
    student, teacher, index = sample(dtype=torch.float64)

    def function(s, **settings):
        return loss(s, teacher, index, normalize=mode, ce_weight=0.5, **settings)

    expected = gradient(function(leaf := student.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(function)(student), expected)
    torch.testing.assert_close(torch.func.vmap(function)(student[None])[0], function(student))
    many = torch.func.vmap(lambda s, y: loss(s, teacher, y, normalize=mode))(student[None], index[None])
    torch.testing.assert_close(many[0], loss(student, teacher, index, normalize=mode))
    slope = (expected * teacher).sum()
    torch.testing.assert_close(torch.func.jvp(function, (student,), (teacher,))[1], slope)
    with fwd.dual_level():
        dual = function(fwd.make_dual(student, teacher))
        torch.testing.assert_close(fwd.unpack_dual(dual).tangent, slope)
    of_subclass = function(student.as_subclass(Logits))
    assert type(of_subclass) is Logits
    torch.testing.assert_close(of_subclass.as_subclass(torch.Tensor), function(student))


def test_the_back_end_asked_for_by_name_says_why_it_cannot():
    student, teacher, index = sample()

    def function(s):
        return kd_loss(s, teacher, index, backend="cpu")

    for call in (lambda: torch.func.grad(function)(student), lambda: torch.func.vmap(function)(student[None])):
        with pytest.raises(ValueError, match=r'transform of torch.func.*backend="reference"'):
            call()
    with pytest.raises(ValueError, match=r'subclass of Tensor.*backend="reference"'):
        function(student.as_subclass(Logits))
    with pytest.raises(ValueError, match=r"student is on meta. Pass tensors on cpu"):
        kd_loss(student.to("meta"), teacher.to("meta"), backend="cpu")
    with pytest.raises(ValueError, match=r"teacher_grad=True.*Pass teacher.detach\(\)"):
        kd_loss(student, teacher.requires_grad_(), backend="cpu", teacher_grad=True)


def test_a_gradient_that_nobody_wants_is_no_obstacle():
    student, teacher, index = sample()
    weight = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        found = dkd_loss(student, teacher, index, kd_weight=weight, backend="cpu")
    assert torch.equal(found, dkd_loss(student, teacher, index, kd_weight=2.0))
