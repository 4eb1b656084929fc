"""What the tests of the losses share: the ways to compute them, inputs, the float64 truth, and what counts as equal."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.losses import available_backends, dkd_loss, kd_loss
from kdcore.losses.normalise import CLASS_EPS, INSTANCE_EPS, normalise
from kdcore.losses.reference import resolve_target

try:
    from kdcore import _C
except ImportError:  # no compiler, or not built yet: the reference alone is tested, and pytest says so
    _C = None

LOSSES = {"kd": kd_loss, "dkd": dkd_loss}
MODES = ("none", "class", "instance")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ISAS = ("generic", "avx2", "avx512")
COMPILED = tuple(isa for isa in ISAS if "cpu" in available_backends() and isa in _C.available_isas())

both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# engines: the plain-torch reference, and the compiled op with each instruction set


@contextmanager
def using(engine: str) -> Iterator[str]:
    """Gives the back end's name for ``backend=``, with the compiled op on this instruction set."""
    if engine == "reference":
        yield engine
        return
    before = _C.cpu_isa()
    _C.set_cpu_isa(engine)
    try:
        yield "cpu"
    finally:
        _C.set_cpu_isa(before)


def _engine(isa: str) -> Any:
    reason = "the compiled op is not built" if not COMPILED else f"this machine has no {isa}"
    return pytest.param(isa, marks=pytest.mark.skipif(isa not in COMPILED, reason=reason))


EVERY_ISA = [_engine(isa) for isa in ISAS]
needs_compiled = pytest.mark.skipif(not COMPILED, reason="the compiled op is not built")
every_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_compiled)])


def on_every_engine(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test, which takes ``backend``, on the reference and on the compiled op with every instruction set."""
    return _spread(test, ["reference", *EVERY_ISA])


def on_every_isa(test: Callable[..., None]) -> Callable[..., None]:
    """The same on the compiled op alone; ``backend`` is optional."""
    return _spread(test, EVERY_ISA)


def _spread(test: Callable[..., None], engines: list[Any]) -> Callable[..., None]:
    signature = inspect.signature(test)
    others = [parameter for name, parameter in signature.parameters.items() if name != "backend"]
    engine = inspect.Parameter("engine", inspect.Parameter.KEYWORD_ONLY)

    @functools.wraps(test)
    def run(*args: Any, engine: str, **kwargs: Any) -> None:
        with using(engine) as backend:
            test(*args, **({"backend": backend} if "backend" in signature.parameters else {}), **kwargs)

    run.__signature__ = signature.replace(parameters=[*others, engine])  # type: ignore[attr-defined]
    return pytest.mark.parametrize("engine", engines)(run)


# inputs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(rows: int, classes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels of a usual size: the teacher sharper, and mostly right."""
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    teacher = 2 * normal(rows, classes, seed=seed)
    teacher[torch.arange(rows), labels] += 2 + 1.2 * math.log(classes)
    student = 0.35 * teacher + normal(rows, classes, seed=seed + 1) + normal(rows, 1, seed=seed + 2)
    return student.to(dtype), teacher.to(dtype), labels


def run(
    loss: Callable[..., Any], student: Tensor, teacher: Tensor, target: Any = None, **settings: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, its gradient (summed over the rows where the loss is of rows) and its parts."""
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value, parts = loss(student, teacher, target, return_parts=True, **settings)
    (grad,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), grad, parts


# the truth


@dataclass(frozen=True)
class Exact:
    """What float64 gives on the same logits.

    Args:
        terms: the largest of what the gradient is a difference of: both sides' probabilities, before the means that the
            normalisation takes off. Two rows of a class normalise to +-1 whatever they hold: all but eps cancels there,
            and what is left is no more accurate than what it was taken from.
    """

    value: Tensor
    grad: Tensor
    parts: dict[str, Tensor]
    terms: float


def exact(loss: Callable[..., Any], student: Tensor, teacher: Tensor, target: Any = None, **settings: Any) -> Exact:
    student, teacher = student.double(), teacher.double()
    settings = {name: _double(part) for name, part in settings.items()}
    value, grad, parts = run(loss, student, teacher, target, **settings, backend="reference")
    return Exact(value, grad, parts, terms(student, teacher, target, **settings) if student.numel() else 0.0)


def terms(
    student: Tensor,
    teacher: Tensor,
    target: Any,
    *,
    temperature: float = 4.0,
    normalize: Any = "none",
    eps: float | None = None,
    kd_weight: float = 1.0,
    beta: Any = 8.0,
    reduction: str = "mean",
    **others: Any,
) -> float:
    labels = resolve_target(target, teacher, -100)
    every = torch.ones(len(student), dtype=torch.bool)
    valid = every if labels.valid is None else labels.valid
    if not valid.any():
        return 0.0
    s, t = student[valid], teacher[valid]
    deviation = torch.ones(())
    if normalize == "class":
        deviation = (s.var(0, correction=0) + (eps or CLASS_EPS)).sqrt()
    elif normalize == "instance":
        deviation = s.std(1, keepdim=True) + (eps or INSTANCE_EPS)
    h = [normalise(z, normalize, eps) / temperature for z in (s, t)]
    p = sum(z.softmax(1) for z in h)
    if labels.index is not None:  # and among the classes that are not the label
        label = labels.index[valid][:, None]
        p = torch.maximum(p, sum(z.scatter(1, label, -math.inf).softmax(1) for z in h))
    most = beta.max().item() if isinstance(beta, Tensor) else beta
    share = kd_weight * max(most, 1) * temperature / (len(s) if reduction == "mean" else 1)
    return share * (p / deviation).nan_to_num().max().item()


def _double(part: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(map(_double, part))
    return part.double() if isinstance(part, Tensor) and part.is_floating_point() else part


# what counts as equal


@dataclass(frozen=True)
class Bounds:
    """How far a result may be from the truth.

    Args:
        loss: relative, beside ``loss_floor`` T^2 (a divergence near 0 is a difference of larger terms).
        element: of the worst gradient element, relative to the largest.
        l2: of the gradient as a vector, relative to its length.
        cancel: of the worst gradient element, relative to the largest term that it is a difference of.
        bias: mean signed error of the gradient, and its mean error away from 0, relative to its mean size.
        unit: half the spacing of the gradient's dtype, relative: what rounding once may add to an element.
        least: half its smallest number.
    """

    loss: float
    loss_floor: float
    element: float
    l2: float
    cancel: float
    bias: float
    unit: float = 0.0
    least: float = 0.0


# Sums are in float64 for float64 and in float32 for the others, and a gradient of half logits is rounded once at its
# very end. So one column holds for the arithmetic of the last three, and `unit` is all that tells them apart.
#   loss: 2e-7 is one float32 rounding, some 50 of which add up in the worst case; 60 in float64.
#   element, l2: the same for sums over a row or a column; kernels stay 10 times below, 5e-6 in the longest row.
#   cancel: a few roundings of either side. It is beyond `element` only where next to nothing is left of them.
#   bias: what is left of the errors when they do not share a sign. A systematic one (a truncation in place of a
#   rounding, a polynomial off by one unit) is of the size of `unit` itself, and would show.
_SINGLE = {"loss": 1e-5, "loss_floor": 1.8e-6, "element": 2e-5, "l2": 1e-5, "cancel": 1e-6, "bias": 2e-6}
TABLE = {
    torch.float64: Bounds(loss=1e-12, loss_floor=1e-14, element=1e-11, l2=1e-12, cancel=1e-14, bias=1e-12),
    torch.float32: Bounds(**_SINGLE, least=2.0**-150),
    torch.float16: Bounds(**_SINGLE, unit=2.0**-11, least=2.0**-25),
    torch.bfloat16: Bounds(**_SINGLE, unit=2.0**-8, least=2.0**-134),
}


@dataclass(frozen=True)
class Slack:
    """What an ill-conditioned case is allowed beyond the table.

    Args:
        factor: of the loss's bound.
        grad: added to every gradient element, where what is left of two saturated sides is nearly nothing.
        roundings: of the gradient to its dtype.
        repeated: the same numbers come again and again and are rounded alike: their errors do not average out.
    """

    factor: float = 1.0
    grad: float = 0.0
    roundings: int = 1
    repeated: bool = False


def check_value(
    dtype: torch.dtype, value: Tensor, truth: Tensor, temperature: float = 4.0, slack: Slack = Slack(), where: str = ""
) -> None:
    """Of a loss or a part, one or one per row."""
    bounds = TABLE[dtype]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), where
    bar = slack.factor * (bounds.loss * truth.abs() + bounds.loss_floor * temperature**2)
    error = (value.double() - truth).abs()
    right = (error <= bar) | (value == truth)  # the second for infinities
    if not right.all():
        i = right.flatten().int().argmin()
        found, true, off, may = (part.flatten()[i].item() for part in (value, truth, error, bar))
        raise AssertionError(f"{where}: {found} is not {true} (off by {off:.2e}, may {may:.2e})")


def check_grad(grad: Tensor, truth: Exact, slack: Slack = Slack(), where: str = "") -> None:
    """By every measure of the table."""
    for name, (found, bar) in measures(grad, truth, slack).items():
        assert found <= bar, f"{where}: {name} of the gradient is {found:.2e}, may be {bar:.2e}"


def measures(grad: Tensor, truth: Exact, slack: Slack = Slack()) -> dict[str, tuple[float, float]]:
    """Each measure's value and bar."""
    bounds, true, size = TABLE[grad.dtype], truth.grad, truth.grad.abs()
    least, unit = bounds.least + slack.grad, bounds.unit * slack.roundings
    if not size.numel() or size.max() == 0:
        return {"size where it is 0": (grad.abs().max().item() if grad.numel() else 0.0, least)}
    error, top, mean = grad.double() - true, size.max().item(), size.mean().item()
    least += bounds.cancel * truth.terms
    bar = bounds.element * top + unit * size + least
    l2 = bounds.l2 + unit + least * math.sqrt(true.numel()) / true.norm().item()
    # a sum of as many independent errors as there are elements of the usual size
    random = 4 * true.norm().item() / size.sum().item() * (unit + 2 * bounds.element * top / mean)
    bias = bounds.bias + (unit if slack.repeated else unit / 50) + least / mean + random
    return {
        "worst element": ((error.abs() / bar).max().item(), 1.0),
        "l2": ((error.norm() / true.norm()).item(), l2),
        "1 - cosine": (_off_cosine(error, true), l2**2 / 2),
        "bias": (abs(error.mean().item()) / mean, bias),
        "bias away from 0": (abs((error * true.sign()).mean().item()) / mean, bias),
    }


def _off_cosine(error: Tensor, true: Tensor) -> float:
    """1 - cos of the angle between true and true + error, from its sine: the cosine itself ends at 1e-16."""
    along = (error * true).sum() / true.square().sum()
    across = (error - along * true).norm() / (true + error).norm().clamp(min=true.norm() / 1e9)
    square = across.square().clamp(max=1)
    return (square / (1 + (1 - square).sqrt())).item()


def check(
    loss: Callable[..., Any],
    student: Tensor,
    teacher: Tensor,
    target: Any = None,
    *,
    backend: str,
    truth: Exact | None = None,
    slack: Slack = Slack(),
    where: str = "",
    **settings: Any,
) -> None:
    """A call against the truth, in everything that it gives.

    The reference sums in float32 as torch does on this machine: a logsumexp of a thousand classes is near 7, where one
    spacing of float32, times beta T^2, is more than the loss's bound.
    """
    if backend == "reference":
        slack = replace(slack, factor=2 * slack.factor)
    truth = truth or exact(loss, student, teacher, target, **settings)
    value, grad, parts = run(loss, student, teacher, target, **settings, backend=backend)
    temperature = settings.get("temperature", 4.0)
    check_value(student.dtype, value, truth.value, temperature, slack, f"{where} loss")
    assert parts.keys() == truth.parts.keys()
    for name in parts:
        check_value(student.dtype, parts[name], truth.parts[name], temperature, slack, f"{where} {name}")
    assert grad.dtype == student.dtype
    assert grad.shape == student.shape
    check_grad(grad, truth, slack, where)
