"""The CUDA kernels, run on the CPU thread by thread: indices, masks, reductions and barriers, against float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from emulated import Emulated, call_of, library, missing
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_table import DTYPES, LOSSES, MODES, check_grad, check_value, exact, logits, run
from test_kernels_split import by_ranks, common, whole
from torch._dynamo.testing import CompileCounterWithBackend

from kdcore.losses import compiled, dkd_loss, functional, kd_loss
from kdcore.losses._ops import numbers_tensor, record_bytes

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# one row of a tile, several, whole words and none, eight classes to a thread, rows cut into splits
SHAPES = [(2, 3), (5, 2), (33, 100), (64, 10), (70, 129), (7, 1000), (9, 1030), (5, 2048), (6, 5001)]
LONG = [(1100, 24), (130, 513), (20, 2052), (4, 9001), (300, 260), (3, 40000)]

every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture(scope="session")
def ops(tmp_path_factory):
    return Emulated(library(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(autouse=True)
def emulated(ops, monkeypatch):
    """The losses run on the emulated kernels."""
    monkeypatch.setattr(compiled, "_call", call_of(ops))
    monkeypatch.setattr(functional, "_eager", None)
    monkeypatch.setattr(compiled, "_statistics", statistics_by(ops))


def statistics_by(ops):
    """Statistics that are not in the op's own passes: those of a loss by rows."""

    def statistics(student, teacher, index, ignored, settings, group=None):
        if not isinstance(settings.stats, str):
            return torch.stack([part.detach().double() for part in settings.stats]), None
        if settings.normalize != "class" or settings.reduction != "none":
            return None, None
        found = [ops.col_stats(z.detach().contiguous(), index, ignored) for z in (student, teacher)]
        return torch.stack([part for count, mean, m2 in found for part in (mean, m2 / count.clamp(min=1))]), None

    return statistics


def check(loss, student, teacher, index, *, temperature=4.0, **kinds):
    truth = exact(loss, student, teacher, index, temperature=temperature, **kinds)
    value, grad, parts = run(loss, student, teacher, index, temperature=temperature, **kinds, backend="cpu")
    check_value(student.dtype, value, truth.value, temperature)
    check_grad(grad, truth)
    for name, part in parts.items():
        check_value(student.dtype, part, truth.parts[name], temperature, where=name)
    return value, grad


@every_dtype
@every_mode
@both_losses
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_loss_gradient_and_parts_agree_with_float64(loss, mode, dtype, ce_weight):
    for rows, classes in SHAPES:
        student, teacher, index = logits(rows, classes, dtype)
        if rows > 30:
            index[::3] = -100
        check(loss, student, teacher, index, normalize=mode, ce_weight=ce_weight)


@every_dtype
@every_mode
@pytest.mark.parametrize("temperature", [0.3, 4.0])  # 0.3: class-normalised logits need their maximum
def test_other_reductions_and_numbers_agree_with_float64(mode, dtype, temperature):
    for rows, classes in [(33, 100), (40, 260)]:
        student, teacher, index = logits(rows, classes, dtype)
        index[::3] = -100
        kinds = {"normalize": mode, "temperature": temperature, "label_smoothing": 0.1, "kd_weight": 0.7}
        for reduction in ("mean", "sum", "none"):
            check(dkd_loss, student, teacher, index, reduction=reduction, ce_weight=0.3, alpha=0.5, beta=3.0, **kinds)


@pytest.mark.long
@every_dtype
@every_mode
@both_losses
@pytest.mark.parametrize("temperature", [0.3, 4.0])
def test_larger_shapes_agree_with_float64(loss, mode, dtype, temperature):
    for rows, classes in LONG:
        inputs = logits(rows, classes, dtype)
        for reduction in ("mean", "none"):
            check(loss, *inputs, normalize=mode, ce_weight=0.5, temperature=temperature, reduction=reduction)


@every_dtype
@pytest.mark.parametrize("padding", [1, 3, 8, 16])
def test_rows_apart_and_out_of_alignment_are_read_as_they_lie(dtype, padding):
    for (rows, classes), mode in itertools.product([(33, 100), (5, 1030), (3, 4500)], MODES):
        wide = [torch.full((rows, classes + padding), math.nan, dtype=dtype) for _ in range(2)]
        first = padding // 2
        views = [z[:, first : first + classes] for z in wide]
        student, teacher, index = logits(rows, classes, dtype)
        for view, z in zip(views, (student, teacher), strict=True):
            view.copy_(z)
        check(dkd_loss, *views, index, normalize=mode, ce_weight=0.5)


@every_mode
@pytest.mark.parametrize("shape", [(33, 100), (6, 5001)], ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(ops, mode, shape):
    student, teacher, index = logits(*shape, torch.float32)
    index[1] = -100
    settings_ = {"normalize": mode, "ce_weight": 0.5, "backend": "cpu"}
    first = run(dkd_loss, student, teacher, index, **settings_)
    try:
        ops.shuffle(True)
        for _ in range(2):
            again = run(dkd_loss, student, teacher, index, **settings_)
            torch.testing.assert_close(again, first, rtol=0, atol=0)
    finally:
        ops.shuffle(False)


@every_mode
def test_one_call_with_a_gradient_is_the_two_of_autograd(ops, mode):
    student, teacher, index = logits(33, 100, torch.float32)
    arguments = (*common(student, teacher, index, normalize=MODES.index(mode)), True)
    loss, parts, grad = ops.fused(*arguments, True)
    again, parts_again, record = ops.prepare(*arguments)
    torch.testing.assert_close((again, parts_again), (loss, parts), rtol=0, atol=0)
    for factor in (1.0, 3.0):  # the record may be used again
        found = ops.complete(torch.tensor(factor), record, *arguments)
        torch.testing.assert_close(found, factor * grad)


@every_dtype
def test_a_cut_batch_with_shared_statistics_and_sums_is_one_batch(ops, dtype):
    for (rows, classes), decoupled in itertools.product([(40, 30), (9, 300)], (True, False)):
        student, teacher, index = logits(rows, classes, dtype)
        index[5] = -100
        weight = 0.5 + torch.rand(rows).to(torch.promote_types(dtype, torch.float32))
        row_beta = 8 * torch.rand_like(weight)
        kind = {"decoupled": decoupled, "temperature": 4.0}
        found, grad, count = by_ranks(student, teacher, index, [3, 7], weight, row_beta, ops=ops, **kind)
        truth = whole(student, teacher, index, weight, row_beta, **kind)
        assert count == rows - 1
        check_value(dtype, found * weight, truth.value)
        check_grad(grad, truth)


@pytest.mark.parametrize("shape", [(600, 520), (1100, 300), (530, 24)], ids=str)
def test_blocks_that_take_many_rows_in_turn_agree_with_float64(ops, shape):
    inputs = logits(*shape, torch.float32)
    ops.shuffle(True)
    try:
        check(dkd_loss, *inputs, normalize="class", ce_weight=0.5)
    finally:
        ops.shuffle(False)


@both_losses
@pytest.mark.parametrize("classes", [9, 5001])
def test_a_label_that_is_no_class_makes_a_loss_by_class_nan(ops, loss, classes):
    student, teacher, index = logits(6, classes, torch.float32)
    index[2] = classes
    arguments = common(student, teacher, index, decoupled=loss is dkd_loss)
    value, _, grad = ops.fused(*arguments, True, True)
    assert value.isnan()
    assert grad.isnan().all()  # through the statistics, which all rows share


def test_given_statistics_of_a_class_that_hardly_varies_leave_no_range():
    student, teacher, index = logits(8, 12, torch.float32)
    mean, var = torch.zeros(12), torch.full((12,), 1e-6)
    check(dkd_loss, student, teacher, index, normalize="class", stats=(mean, var, mean, var), temperature=1.0)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_the_largest_value_that_a_class_can_have_at_any_temperature(temperature):
    student, teacher, index = logits(64, 12, torch.float32)
    student[5, 3] = teacher[5, 3] = 1e3
    check(dkd_loss, student, teacher, index, normalize="class", temperature=temperature)


@both_losses
@every_mode
def test_a_label_that_is_no_class_makes_its_row_nan_and_no_other(ops, loss, mode):
    student, teacher, index = logits(6, 9, torch.float32)
    index[2] = 9
    numbers = {"normalize": MODES.index(mode), "decoupled": loss is dkd_loss}
    stats = torch.rand(4, 9, dtype=torch.float64) + 0.5 if mode == "class" else None
    arguments = common(student, teacher, index, None, stats, **numbers)
    rows, _ = ops.forward(*arguments)
    grad = ops.backward(
        torch.ones(6), *common(student, teacher, index, None, stats, **numbers, through=False), None, None
    )
    assert rows.isnan().tolist() == [row == 2 for row in range(6)]
    assert grad.isnan().any(1).tolist() == [row == 2 for row in range(6)]


@every_mode
def test_large_logits_stay_finite(mode):
    student, teacher, index = (z * 1e4 if z.is_floating_point() else z for z in logits(8, 12, torch.float32))
    value, grad, _ = run(dkd_loss, student, teacher, index, normalize=mode, ce_weight=0.5, backend="cpu")
    assert value.isfinite()
    assert grad.isfinite().all()


@both_losses
@pytest.mark.parametrize("classes", [12, 5001])
def test_a_class_that_both_sides_mask_is_not_there(loss, classes):
    student, teacher, index = logits(8, classes, torch.float32)
    index %= 8
    student[:, 9] = teacher[:, 9] = -math.inf
    value, grad, _ = run(loss, student, teacher, index, backend="cpu")
    kept = [column for column in range(classes) if column != 9]
    expected, slope, _ = run(loss, student[:, kept], teacher[:, kept], index, backend="reference")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[:, kept], slope)
    assert (grad[:, 9] == 0).all()


def test_a_class_that_the_student_alone_masks_costs_infinity():
    student, teacher, _ = logits(8, 12, torch.float32)
    student[:, 9] = -math.inf
    assert kd_loss(student, teacher, backend="cpu") == math.inf
    assert kd_loss(teacher, student, backend="cpu").isfinite()


def test_a_constant_class_is_normalised_to_zero(ops):
    for offset, rows in itertools.product((0.0, 1e4, 0.1), (7, 512, 1000)):
        z = torch.full((rows, 21), offset)
        count, mean, m2 = ops.col_stats(z, None, -100)
        assert count == rows
        assert (mean == z[0].double()).all()
        assert (m2 == 0).all()


def test_an_offset_of_a_class_costs_no_accuracy():
    student, teacher, index = logits(64, 30, torch.float64)
    offsets = torch.arange(30) * 100.0
    moved = [(z + offsets).float() for z in (student, teacher)]
    check(dkd_loss, *moved, index, normalize="class")


@every_mode
def test_where_no_row_counts_loss_and_gradient_are_zero(mode):
    student, teacher, index = logits(6, 9, torch.float32)
    value, grad, _ = run(dkd_loss, student, teacher, index * 0 - 100, normalize=mode, ce_weight=1.0, backend="cpu")
    assert value == 0
    assert (grad == 0).all()


def test_given_statistics_and_a_weight_for_each_row():
    student, teacher, index = logits(33, 100, torch.float32)
    stats = (student.mean(0) + 0.1, student.var(0) + 0.2, teacher.mean(0), teacher.var(0))
    beta = 8 * torch.rand(33)
    check(dkd_loss, student, teacher, index, normalize="class", stats=stats, beta=beta)
    check(dkd_loss, student, teacher, index, normalize="class", stats="detached", beta=beta, ce_weight=0.5)


@settings(max_examples=500)
@given(
    rows=st.integers(1, 100_000),
    classes=st.integers(2, 200_000),
    normalize=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
)
def test_python_knows_the_size_of_a_record(ops, rows, classes, normalize, dtype):
    found = ops.record_bytes(rows, classes, normalize, dtype)
    assert found == record_bytes(rows, classes, normalize, dtype == torch.float64)


# prepare and complete, which CUDA alone has, as torch knows them


@pytest.fixture
def registered(ops):
    """Both, for CPU tensors, while a test runs."""
    library = torch.library.Library("kdcore", "IMPL")
    library.impl("prepare", lambda *arguments: ops.prepare(*arguments), "CPU")
    library.impl("complete", lambda *arguments: ops.complete_alone(*arguments), "CPU")
    yield torch.ops.kdcore
    library._destroy()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_are_registered_as_they_behave(registered, mode, dtype):
    student, teacher, index = logits(6, 5, dtype)
    index[1] = -100
    student.requires_grad_()
    arguments = (*common(student, teacher, index, normalize=MODES.index(mode)), True)
    tensors, numbers, switches = arguments[:5], arguments[5:12], arguments[12:]
    torch.library.opcheck(registered.prepare.default, arguments)
    dynamic = torch.tensor(numbers, dtype=torch.float64)
    torch.library.opcheck(registered.prepare_dynamic.default, (*tensors, dynamic, *switches))
    _, _, record = registered.prepare(*arguments)
    grad_loss = torch.ones((), dtype=dtype, requires_grad=True)
    torch.library.opcheck(
        registered.complete.default,
        (grad_loss, student, teacher, record, *switches[1:]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@every_mode
def test_the_gradient_of_a_prepared_loss_may_be_asked_for_again_but_not_differentiated(registered, mode):
    student, teacher, index = logits(6, 5, torch.float32)
    student.requires_grad_()
    loss, _, _ = registered.prepare(*common(student, teacher, index, normalize=MODES.index(mode)), True)
    first, second = (torch.autograd.grad(factor * loss, student, retain_graph=True)[0] for factor in (1, 3))
    torch.testing.assert_close(second, 3 * first)
    assert torch.equal(torch.autograd.grad(loss, student, retain_graph=True)[0], first)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), student)


def test_compile_takes_both_without_compiling_anew(registered):
    student, teacher, index = logits(6, 5, torch.float32)
    student.requires_grad_()

    def step(temperature):
        numbers = numbers_tensor([temperature, 1.0, 8.0, 1.0, 0.5, 0.0, 1e-5])
        loss, _, _ = registered.prepare_dynamic(
            student, teacher, index, None, None, numbers, -100, 1, True, True, True, True
        )
        return loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled_step = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for temperature in (2.5, 3.5, 4.5):
        found, expected = compiled_step(temperature), step(temperature)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in (found, expected)))
    assert counter.frame_count == 1
