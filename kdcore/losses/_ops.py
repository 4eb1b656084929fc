"""The compiled ops as torch knows them: what they return, their derivatives, and which back ends there are.

``torch.ops.kdcore`` holds ``col_stats``, ``fused``, ``forward``, ``sums`` and ``backward``, whose schemas are in
csrc/ops.cpp, and for CUDA ``prepare`` and ``complete``: the loss, and its gradient from a record of the rest. What is
registered here is registered once, when the extension is loaded.

``fused_dynamic`` and three others are the same ops with their seven numbers in one tensor, for torch.compile: a float
argument of an op is a constant of the graph, so a schedule of temperatures or weights would compile anew at every step;
an element of a tensor is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

from ._extension import cpu_ops, cuda_ops, why_not
from .normalise import CLASS_EPS, INSTANCE_EPS, accumulator

Backend = Literal["auto", "reference", "cpu", "cuda"]

NO_SECOND_DERIVATIVE = (
    "the compiled loss has no second derivative: its gradient cannot be differentiated. "
    'Use backend="reference", which can be, any number of times.'
)
MODES = {"none": 0, "class": 1, "instance": 2}
"""The ops' numbers for ``normalize``."""
DEFAULT_EPS = {"none": CLASS_EPS, "class": CLASS_EPS, "instance": INSTANCE_EPS}

_TENSORS = "Tensor student, Tensor teacher, Tensor? index, Tensor? row_beta, Tensor? stats, Tensor numbers"
_SWITCHES = "int ignore_index, int normalize, bool decoupled, bool cross_entropy, bool through"
_DYNAMIC = {  # schema, and where the numbers are
    "fused": (f"({_TENSORS}, {_SWITCHES}, bool mean, bool grad) -> (Tensor loss, Tensor parts, Tensor grad)", 5),
    "prepare": (f"({_TENSORS}, {_SWITCHES}, bool mean) -> (Tensor loss, Tensor parts, Tensor record)", 5),
    "forward": (f"({_TENSORS}, {_SWITCHES}) -> (Tensor loss, Tensor parts)", 5),
    "backward": (f"(Tensor grad_loss, {_TENSORS}, {_SWITCHES}, Tensor? sums, Tensor? count) -> Tensor", 6),
}


def available_backends() -> tuple[str, ...]:
    """The back ends of this installation, best first: "cuda" and "cpu" where they are built, and "reference".

    ``backend="auto"`` is the one of the tensors' device, or "reference".
    """
    return _AVAILABLE


def choose_backend(backend: str, device: str) -> str:
    """Gives the back end's name, with "auto" resolved: "cpu" for tensors there, if it is loaded, else "reference".

    The CUDA kernels have not run on a GPU yet: they are taken where they are asked for by name.

    Raises:
        ValueError: no back end has that name.
        RuntimeError: it exists but is not in this installation.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is unknown. Use one of {', '.join(get_args(Backend))}.")
    if backend == "auto":
        return "cpu" if device == "cpu" and "cpu" in _AVAILABLE else "reference"
    if backend not in _AVAILABLE:
        raise RuntimeError(
            f"backend={backend!r} needs the compiled op, which this installation of kdcore does not have: "
            f'{why_not(backend)}. Use backend="auto" or one of {", ".join(_AVAILABLE)}: they compute the same loss.'
        )
    return backend


def numbers_tensor(numbers: Sequence[float]) -> Tensor:
    """The seven numbers for the dynamic ops, by arithmetic that torch.compile keeps symbolic."""
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + number for number in numbers])


def named_parts(parts: Tensor, decoupled: bool, with_ce: bool) -> dict[str, Tensor]:
    kd, tckd, nckd, ce = parts.unbind()
    named = {"kd": kd, "tckd": tckd, "nckd": nckd} if decoupled else {"kd": kd}
    return {**named, "ce": ce} if with_ce else named


class Once(torch.autograd.Function):
    """A gradient as it is; whoever differentiates it with respect to ``student`` is told that this is not possible."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, student: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


# What the ops return


def _pair_shape(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    torch._check(student.dim() == 2, lambda: "kdcore: logits must be [B, C]")
    torch._check(teacher.shape == student.shape, lambda: "kdcore: student and teacher differ in shape")
    return student.shape[0], student.shape[1]


def _fake_col_stats(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(z.dim() == 2, lambda: "kdcore: logits must be [B, C]")
    shapes: tuple[tuple[int, ...], ...] = ((), (z.shape[1],), (z.shape[1],))
    count, mean, m2 = (z.new_empty(shape, dtype=torch.float64) for shape in shapes)
    return count, mean, m2


def _fake_fused(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape, acc, wanted = _pair_shape(student, teacher), accumulator(student), rest[-1]
    grad = student.new_empty(shape if wanted else (0,))
    return student.new_empty((), dtype=acc), student.new_empty(4, dtype=acc), grad


def _fake_prepare(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape, acc, normalize = _pair_shape(student, teacher), accumulator(student), rest[-5]
    size = record_bytes(*shape, normalize, acc == torch.float64)
    return student.new_empty((), dtype=acc), student.new_empty(4, dtype=acc), student.new_empty(size, dtype=torch.uint8)


def record_bytes(rows: int, classes: int, normalize: int, double: bool) -> int:
    """The size of a record: csrc/cuda/kernels.cu cuts it into arrays at multiples of 256 bytes."""
    word, of_row, of_instance = (8, 80, 56) if double else (4, 48, 28)
    arrays = [2 * word, rows * of_row]
    if normalize == MODES["instance"]:
        arrays.append(rows * of_instance)
    if normalize == MODES["class"]:
        padded = (classes + 127) // 128 * 128
        arrays += [padded * word] * 6 + [2 * padded * word]
    return sum((size + 255) // 256 * 256 for size in arrays)


def _fake_complete(grad_loss: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(_pair_shape(student, teacher))


def _fake_forward(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, acc = _pair_shape(student, teacher)[0], accumulator(student)
    return student.new_empty(rows, dtype=acc), student.new_empty((4, rows), dtype=acc)


def _fake_sums(grad_loss: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
    return student.new_empty((2, _pair_shape(student, teacher)[1]), dtype=accumulator(student))


def _fake_backward(grad_loss: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(_pair_shape(student, teacher))


# Their derivatives


def _refuse_other_gradients(needed: Sequence[bool]) -> None:
    for name, needs in zip(("teacher", "index", "row_beta", "stats"), needed[1:5], strict=True):
        if needs:
            raise RuntimeError(
                f"the compiled loss gives {name} no gradient, but it requires one. Pass {name}.detach(), "
                'or call kd_loss or dkd_loss with backend="reference".'
            )


def _setup_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _refuse_other_gradients(ctx.needs_input_grad)
    loss, parts, grad = output
    ctx.arguments = len(inputs)
    if not inputs[-1]:  # called without grad: nothing to give back
        ctx.mark_non_differentiable(loss, parts, grad)
        return
    ctx.mark_non_differentiable(parts, grad)
    ctx.save_for_backward(grad, inputs[0])


def _backward_fused(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    grad, student = ctx.saved_tensors
    if torch.is_grad_enabled():  # the result depends on the student, but how is not known
        grad = Once.apply(grad, student)
    return grad * grad_loss, *[None] * (ctx.arguments - 1)


def _setup_prepare(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _refuse_other_gradients(ctx.needs_input_grad)
    _, parts, record = output
    ctx.mark_non_differentiable(parts, record)
    ctx.arguments = len(inputs)
    ctx.rest = inputs[-5:]  # normalize, decoupled, cross_entropy, through, mean
    ctx.save_for_backward(inputs[0], inputs[1], record)


def _backward_prepare(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    grad = torch.ops.kdcore.complete(grad_loss, *ctx.saved_tensors, *ctx.rest)
    return grad, *[None] * (ctx.arguments - 1)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _refuse_other_gradients(ctx.needs_input_grad)
    ctx.mark_non_differentiable(output[1])
    ctx.dynamic = isinstance(inputs[5], Tensor)
    tensors = 6 if ctx.dynamic else 5
    # what was computed in inference mode cannot be saved as it is
    ctx.save_for_backward(*(z.clone() if z is not None and z.is_inference() else z for z in inputs[:tensors]))
    ctx.rest = inputs[tensors:]


def _backward_forward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    op = torch.ops.kdcore.backward_dynamic if ctx.dynamic else torch.ops.kdcore.backward
    tensors = ctx.saved_tensors
    grad = op(grad_loss, *tensors, *ctx.rest, None, None)
    return grad, *[None] * (len(tensors) + len(ctx.rest) - 1)


def _setup_constant(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _setup_last(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


_RULES: dict[str, tuple[Callable[..., Any], ...]] = {  # fake, setup of the context, derivative
    "col_stats": (_fake_col_stats, _setup_constant, _no_derivative),
    "fused": (_fake_fused, _setup_fused, _backward_fused),
    "prepare": (_fake_prepare, _setup_prepare, _backward_prepare),
    "complete": (_fake_complete, _setup_last, _no_derivative),
    "forward": (_fake_forward, _setup_forward, _backward_forward),
    "sums": (_fake_sums, _setup_constant, _no_derivative),
    "backward": (_fake_backward, _setup_last, _no_derivative),
}


def _register() -> torch.library.Library:
    library = torch.library.Library("kdcore", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in _DYNAMIC:
        _define_dynamic(library, name)
    for name, (fake, setup, derivative) in _RULES.items():
        for full in (name, f"{name}_dynamic") if name in _DYNAMIC else (name,):
            torch.library.register_fake(f"kdcore::{full}", fake, lib=library)
            torch.library.register_autograd(f"kdcore::{full}", derivative, setup_context=setup, lib=library)
    return library


def _define_dynamic(library: torch.library.Library, name: str) -> None:
    schema, at = _DYNAMIC[name]
    op = getattr(torch.ops.kdcore, name).default

    def same(*arguments: Any) -> Any:
        return op(*arguments[:at], *arguments[at].tolist(), *arguments[at + 1 :])

    library.define(f"{name}_dynamic{schema}")  # type: ignore[no-untyped-call]
    library.impl(f"{name}_dynamic", same, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


_AVAILABLE = (*(["cuda"] if cuda_ops() else []), *(["cpu"] if cpu_ops() else []), "reference")
_LIBRARY = _register() if cpu_ops() else None  # the registrations last as long as this object
