"""The identities that the losses keep, for any logits, on every back end and instruction set.

`make test` tries 300 cases of each on the compiled op (its instruction set is part of a case), `make test-long` 5,000;
they differ from run to run. A failure prints how to get its case again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from losses_table import COMPILED, DTYPES, LOSSES, MODES, Slack, check, every_backend, run, terms, using

from kdcore.losses.normalise import class_statistics, normalise

common = settings(derandomize=False, print_blob=True, suppress_health_check=list(HealthCheck))
for name, examples in {"reference": 50, "cpu": 300, "reference-long": 500, "cpu-long": 5000}.items():
    settings.register_profile(f"losses-{name}", common, max_examples=examples)


def holds(**drawn):
    """Makes a test of a property, which takes ``backend`` and what is drawn."""

    def make(property_):
        @every_backend
        @pytest.mark.parametrize("length", ["", pytest.param("-long", marks=pytest.mark.long)], ids=["", "long"])
        def test(backend, length):
            @functools.wraps(property_, assigned=("__name__", "__qualname__"), updated=())
            def attempt(engine, **kwargs):
                with using(engine) as name:
                    property_(backend=name, **kwargs)

            del attempt.__wrapped__
            engines = st.sampled_from(COMPILED) if backend == "cpu" else st.just(backend)
            profile = settings.get_profile(f"losses-{backend}{length}")
            profile(given(engine=engines, **drawn)(attempt))()

        test.__doc__ = property_.__doc__
        return test

    return make


# Cases. Quarters and eighths: shifts are exact in every dtype, and a row or column is either constant or far from it.
# Numbers come as bytes, many in one draw, which is quick; 0 is what they shrink to.

TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 4.0, 7.3])
WIDE = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Case:
    student: torch.Tensor  # [B, C]
    teacher: torch.Tensor  # [B, C]
    target: torch.Tensor  # [B]
    loss: str = "dkd"
    mode: Any = "none"
    temperature: float = 4.0
    eps: float | None = None

    def call(self, backend, **settings):
        kind = {"normalize": self.mode, "temperature": self.temperature, "eps": self.eps, "backend": backend}
        return run(LOSSES[self.loss], self.student, self.teacher, self.target, **{**kind, **settings})

    @functools.cached_property
    def spread(self):
        """The widest row, scaled or not: roundings of exponents and on the way through deviations grow with it."""
        valid = self.target != -100
        if not valid.any():
            return 4.0
        h = torch.stack([normalise(z[valid].double(), self.mode, self.eps) for z in (self.student, self.teacher)])
        return 4 + (h.amax(2) - h.amin(2)).max().item() / min(self.temperature, 1)

    @functools.cached_property
    def unit(self):
        return 8 * self.spread * torch.finfo(torch.promote_types(self.student.dtype, torch.float32)).eps / 2

    def same(self, value, expected, scale=1.0):
        """Of losses, by row or their mean."""
        torch.testing.assert_close(value, expected, rtol=self.unit, atol=9 * scale * self.temperature**2 * self.unit)

    def same_grad(self, grad, expected, scale=1.0):
        sides = (self.student.double(), self.teacher.double(), self.target)
        size = terms(*sides, normalize=self.mode, temperature=self.temperature, eps=self.eps)
        torch.testing.assert_close(grad, expected, rtol=self.unit, atol=scale * size * self.unit)


@st.composite
def cases(draw, rows=(2, 5, 33), modes=MODES, losses=tuple(LOSSES), dtypes=WIDE, classes=(2, 6, 70)):
    """Small ones by number, which shrink; larger ones by seed."""
    b, c = draw(st.integers(rows[0], rows[1])), draw(st.integers(classes[0], classes[1]))
    dtype = draw(st.sampled_from(dtypes))
    if draw(st.booleans()):
        sides = [quarters(draw, b * c, dtype).view(b, c) for _ in range(2)]
        target = some_bytes(draw, b) % c
    else:
        b, c = draw(st.integers(rows[0], rows[2])), draw(st.integers(classes[0], classes[2]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        size = 8 * draw(st.sampled_from([0.2, 1.0, 5.0, 12.0]))
        sides = [(torch.randn(b, c, generator=generator) * size).round().clamp(-320, 320) / 8 for _ in range(2)]
        if draw(st.booleans()):
            sides[0][:, draw(st.integers(0, c - 1))] = draw(st.integers(-320, 320)) / 8
            sides[1][draw(st.integers(0, b - 1))] = draw(st.integers(-320, 320)) / 8
        sides = [side.to(dtype) for side in sides]
        target = torch.randint(c, (b,), generator=generator)
    kind = draw(st.sampled_from(losses)), draw(st.sampled_from(modes)), draw(TEMPERATURES)
    return Case(*sides, target, *kind)


def fits(case):
    """A constant row has a gradient of 1e7 T / B under "instance", which float16 cannot hold."""
    row_is_constant = case.student.amax(1) == case.student.amin(1)
    return case.mode != "instance" or case.student.dtype != torch.float16 or not row_is_constant.any()


def some_bytes(draw, count):
    return torch.tensor(list(draw(st.binary(min_size=count, max_size=count))))


def quarters(draw, count, dtype=torch.float64):
    """Between -32 and 31.75."""
    numbers = some_bytes(draw, count)
    return torch.where(numbers % 2 == 1, -(numbers // 2) - 1, numbers // 2).to(dtype) / 4


def shuffled(draw, count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))))


# Properties


@holds(case=cases())
def test_kd_equals_dkd_with_beta_one_minus_py(backend, case):
    p = F.softmax(normalise(case.teacher.double(), case.mode) / case.temperature, dim=1)
    rest = p.scatter(1, case.target[:, None], 0).sum(1)  # 1 - p_y without cancellation
    kd, kd_grad, _ = replace(case, loss="kd").call(backend, reduction="none")
    one = {"alpha": 1.0, "beta": rest.to(case.student.dtype), "reduction": "none"}
    dkd, dkd_grad, _ = replace(case, loss="dkd").call(backend, **one)
    case.same(kd, dkd)
    case.same_grad(kd_grad, dkd_grad, len(case.target))


@holds(case=cases(), data=st.data())
def test_a_constant_added_to_a_row_or_column_changes_nothing(backend, case, data):
    b, c = case.student.shape
    shift = quarters(data.draw, c if case.mode == "class" else b, case.student.dtype)
    shift = shift if case.mode == "class" else shift[:, None]
    value, grad, _ = case.call(backend)
    moved = replace(case, student=case.student + shift, teacher=case.teacher - 2 * shift)
    moved_value, moved_grad, _ = moved.call(backend)
    case.same(moved_value, value)
    case.same_grad(moved_grad, grad)


@holds(case=cases(modes=("class", "instance")), data=st.data())
def test_a_scaled_row_or_column_changes_nothing_without_eps(backend, case, data):
    case = replace(case, eps=1e-30)
    b, c = case.student.shape
    factors = torch.tensor([1.0, 0.125, 0.25, 0.5, 2.0, 8.0, 3.0], dtype=case.student.dtype)  # exact with so few bits
    factor = factors[some_bytes(data.draw, c if case.mode == "class" else b) % len(factors)]
    factor = factor if case.mode == "class" else factor[:, None]
    value, _, _ = case.call(backend)
    for scaled in ({"student": case.student * factor}, {"teacher": case.teacher * factor}):
        case.same(replace(case, **scaled).call(backend)[0], value)


@holds(case=cases(), data=st.data())
def test_permuted_rows_permute_the_losses_and_permuted_classes_change_nothing(backend, case, data):
    kind = {"ce_weight": 0.5, "reduction": "none"}
    value, grad, _ = case.call(backend, **kind)
    size = len(value)
    rows = shuffled(data.draw, size)
    moved = replace(case, student=case.student[rows], teacher=case.teacher[rows], target=case.target[rows])
    found, found_grad, _ = moved.call(backend, **kind)
    case.same(found, value[rows], scale=2)
    case.same_grad(found_grad, grad[rows], 2 * size)
    classes = shuffled(data.draw, case.student.shape[1])
    sides = {"student": case.student[:, classes], "teacher": case.teacher[:, classes]}
    found, found_grad, _ = replace(case, **sides, target=classes.argsort()[case.target]).call(backend, **kind)
    case.same(found, value, scale=2)
    case.same_grad(found_grad, grad[:, classes], 2 * size)


@holds(case=cases())
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(backend, case):
    case = replace(case, teacher=case.student)
    value, grad, _ = case.call(backend)
    assert value == 0
    case.same_grad(grad, torch.zeros_like(grad))


@holds(case=cases())
def test_the_loss_of_every_row_is_at_least_zero(backend, case):
    value, _, _ = case.call(backend, reduction="none")
    case.same(value.clamp(max=0), torch.zeros_like(value))


@holds(case=cases())
def test_the_gradient_sums_to_zero(backend, case):
    _, grad, _ = case.call(backend, reduction="sum")
    total = grad.sum(0 if case.mode == "class" else 1)
    size = len(case.target) * grad.shape[0 if case.mode == "class" else 1]
    case.same_grad(total, torch.zeros_like(total), size)


@holds(case=cases(modes=("none",), losses=("kd",)))
def test_plain_kd_is_torchs_kl_div_over_the_batch_times_t_squared(backend, case):
    log_s, log_t = (F.log_softmax(z / case.temperature, dim=1) for z in (case.student, case.teacher))
    expected = case.temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    case.same(case.call(backend)[0], expected)


@holds(case=cases(losses=("dkd",), classes=(2, 2, 2)))
def test_two_classes_leave_nothing_to_compare_among_the_others(backend, case):
    value, grad, parts = case.call(backend, alpha=0.0)
    assert value == parts["nckd"] == 0
    assert (grad == 0).all()
    assert case.call(backend)[0] == case.call(backend, beta=0.0)[0]


@holds(case=cases(rows=(2, 6, 70)), data=st.data())
def test_ignored_rows_are_invisible_whatever_they_hold(backend, case, data):
    b = len(case.target)
    gone = some_bytes(data.draw, b) > data.draw(st.sampled_from([128, 30, 220]))
    assume(2 <= (~gone).sum() < b)
    junk = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e4, 0.0]))
    dirty = {name: getattr(case, name).clone() for name in ("student", "teacher")}
    for side in dirty.values():
        side[gone] = junk
    kind = {"ce_weight": 0.5, "label_smoothing": 0.1, "reduction": data.draw(st.sampled_from(["mean", "sum", "none"]))}
    left = replace(case, student=case.student[~gone], teacher=case.teacher[~gone], target=case.target[~gone])
    expected, expected_grad, expected_parts = left.call(backend, **kind)
    value, grad, parts = replace(case, **dirty, target=case.target.masked_fill(gone, -100)).call(backend, **kind)
    if kind["reduction"] == "none":
        assert (value[gone] == 0).all()
        value = value[~gone]
    size = len(left.target)
    left.same(value, expected, scale=2 * size)
    assert (grad[gone] == 0).all()
    left.same_grad(grad[~gone], expected_grad, 2 * size)
    left.same(torch.stack([*parts.values()]), torch.stack([*expected_parts.values()]), scale=2)


@holds(case=cases(modes=("class",), rows=(2, 6, 40)), data=st.data())
def test_two_part_batches_with_shared_statistics_are_one_batch(backend, case, data):
    whole, _, _ = case.call(backend, reduction="sum")
    _, whole_grad, _ = case.call("reference", reduction="sum")
    cut = data.draw(st.integers(1, len(case.target) - 1))
    student = case.student.clone().requires_grad_()
    shared = (*class_statistics(student), *class_statistics(case.teacher))
    held = tuple(part.detach() for part in shared)
    losses = []
    for part in (slice(cut), slice(cut, None)):
        piece = replace(case, student=case.student[part], teacher=case.teacher[part], target=case.target[part])
        losses.append(piece.call(backend, stats=held, reduction="sum")[0])
    case.same(sum(losses), whole, scale=len(case.target))
    kind = {"normalize": "class", "temperature": case.temperature, "reduction": "sum", "stats": shared}
    function = LOSSES[case.loss]
    total = sum(
        function(student[part], case.teacher[part], case.target[part], **kind)
        for part in (slice(cut), slice(cut, None))
    )
    (grad,) = torch.autograd.grad(total, student)
    case.same_grad(grad, whole_grad, len(case.target))


@holds(data=st.data(), classes=st.integers(2, 40), dtype=st.sampled_from(DTYPES), loss=st.sampled_from(list(LOSSES)))
def test_corners_of_ten_thousand_stay_finite(backend, data, classes, dtype, loss):
    few = min(classes, 5)
    corners = torch.tensor([0.0, 1e4, -1e4], dtype=dtype)
    sides = [corners[some_bytes(data.draw, 2 * few) % 3].view(2, few).repeat(1, 8)[:, :classes] for _ in range(2)]
    case = Case(
        *sides, torch.tensor([0, classes - 1]), loss, data.draw(st.sampled_from(MODES)), data.draw(TEMPERATURES)
    )
    assume(fits(case))
    value, grad, parts = case.call(backend, ce_weight=1.0, reduction=data.draw(st.sampled_from(["mean", "none"])))
    assert value.isfinite().all()
    assert all(part.isfinite() for part in parts.values())
    assert grad.isfinite().all()
    assert grad.dtype == dtype


@holds(case=cases(rows=(2, 6, 70), dtypes=DTYPES, classes=(2, 6, 140)), data=st.data())
def test_any_call_agrees_with_float64_on_the_same_logits(backend, case, data):
    b = len(case.target)
    assume(fits(case))
    draw, weights = data.draw, st.sampled_from([0.0, 0.3, 1.0, 5.0])
    kind = {
        "kd_weight": draw(st.sampled_from([0.3, 1.0])),
        "ce_weight": draw(weights),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if case.loss == "dkd":
        beta = draw(st.sampled_from([0.0, 1.0, 8.0, None]))
        kind |= {"alpha": draw(weights), "beta": torch.arange(b) / b * 8 if beta is None else beta}
    if case.mode == "class":
        given_ = tuple(part for z in (case.student, case.teacher) for part in class_statistics(z))
        kind |= {"stats": draw(st.sampled_from(["batch", "detached", given_]))}
    target = case.target.clone()
    gone = some_bytes(draw, b) > draw(st.sampled_from([255, 128]))
    gone[:2] = False
    target[gone] = -100
    case = replace(case, target=target)
    kind |= {"normalize": case.mode, "temperature": case.temperature}
    sides = (case.student.double(), case.teacher.double())
    size = terms(*sides, target, **{name: value for name, value in kind.items() if name != "stats"})
    count = 1 if kind["reduction"] != "sum" else b
    slack = Slack(factor=count * case.spread, grad=case.unit * size, repeated=True)
    check(LOSSES[case.loss], case.student, case.teacher, target, slack=slack, backend=backend, **kind)
