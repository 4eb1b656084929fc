"""What the tests on a GPU share: the device, and a call there against float64 on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses_table import Exact, check_grad, check_value, exact, run
from torch import Tensor

from kdcore.losses import available_backends
from kdcore.losses._extension import why_not

BACKEND = "cuda"
DEVICE = "cuda:0"  # whichever is the current one

REQUIRED = os.environ.get("KDCORE_REQUIRE_EXT") == "1"
"""What is missing is then no reason to skip a test."""

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REQUIRED and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
needs_op = pytest.mark.skipif(
    not REQUIRED and BACKEND not in available_backends(), reason=f"the compiled op is not there: {why_not(BACKEND)}"
)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def check(
    loss: Callable[..., Any],
    student: Tensor,
    teacher: Tensor,
    target: Any,
    *,
    truth: Exact | None = None,
    where: str = "",
    **settings: Any,
) -> None:
    """A call on the device against float64 in plain torch on the CPU, in everything that it gives."""
    truth = truth or exact(loss, student, teacher, target, **settings)
    there = {name: _move(value) for name, value in settings.items()}
    value, grad, parts = run(loss, *on_device(student, teacher), _move(target), **there, backend=BACKEND)
    temperature = settings.get("temperature", 4.0)
    check_value(student.dtype, value.cpu(), truth.value, temperature, where=f"{where} loss")
    assert parts.keys() == truth.parts.keys()
    for name, part in parts.items():
        check_value(student.dtype, part.cpu(), truth.parts[name], temperature, where=f"{where} {name}")
    assert grad.dtype == student.dtype
    check_grad(grad.cpu(), truth, where=where)


def _move(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_move(part) for part in value)
    return value.to(DEVICE) if isinstance(value, Tensor) else value
