"""The CUDA kernels on the CPU: csrc/cuda/kernels.cu compiled as C++, its threads run by tests/simt.

What is tested this way is everything but nvcc: indices, masks, the order of reductions, barriers, workspace, launch
plans. The ops here take what those of ``torch.ops.kdcore`` take.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from ctypes import byref, c_bool, c_double, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-mf16c")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def missing() -> str | None:
    if platform.machine() != "x86_64":
        return "the fibers are written for x86-64"
    return None if shutil.which("g++") else "no g++"


class Logits(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64))


class Shape(ctypes.Structure):
    _fields_ = (
        *(("rows", c_int64), ("classes", c_int64), ("dtype", c_int), ("index", c_void_p)),
        ("ignore_index", c_int64),
    )


class Problem(ctypes.Structure):  # as in launch.h
    _fields_ = (
        *(("shape", Shape), ("student", Logits), ("teacher", Logits)),
        *((name, c_void_p) for name in ("row_beta", "row_weight", "grad_loss")),
        ("mean", c_bool),
        *((name, c_double) for name in ("temperature", "alpha", "beta", "kd_weight", "ce_weight", "smoothing", "eps")),
        *(("normalize", c_int), ("decoupled", c_bool), ("cross_entropy", c_bool)),
        *(("stats", c_void_p), ("through", c_bool), ("sums", c_void_p), ("count", c_void_p)),
        *((name, c_void_p) for name in ("loss", "part_means", "row_losses", "row_parts", "col_sums", "grad", "record")),
        ("recorded", c_bool),
    )


class ColStats(ctypes.Structure):
    _fields_ = (("shape", Shape), ("logits", Logits), ("count", c_void_p), ("mean", c_void_p), ("m2", c_void_p))


@cache
def library(folder: Path, *flags: str) -> ctypes.CDLL:
    """Builds it, once a folder."""
    path = folder / "emulated.so"
    sources = [str(ROOT / "tests/simt" / name) for name in ("emulated.cpp", "simt.cpp")]
    include = [f"-I{ROOT / 'tests/simt'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *FLAGS, *flags, *include, *sources, "-o", str(path)], check=True)
    found = ctypes.CDLL(str(path))
    for name in ("kd_workspace_bytes", "kd_record_bytes", "kd_problem_size", "kd_stats_bytes"):
        getattr(found, name).restype = c_size_t
    assert found.kd_problem_size() == ctypes.sizeof(Problem)
    return found


class Emulated:
    """The ops; every output and workspace is filled with junk before it is written."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._kept: list[Tensor] = []

    def shuffle(self, on: bool) -> None:
        """Runs threads and blocks in a random order, or in that of their numbers."""
        self._library.simt_shuffle(on)

    def record_bytes(self, rows: int, classes: int, normalize: int, dtype: torch.dtype) -> int:
        shape = Shape(rows, classes, DTYPES[dtype], None, 0)
        problem = Problem(shape=shape, normalize=normalize, temperature=1, record=1, recorded=True)
        return int(self._library.kd_record_bytes(byref(problem)))

    def fused(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *common, mean, grad = arguments
        problem, acc, shape = self._problem(*common)
        loss, parts = _junk((), acc), _junk((4,), acc)
        gradient = _junk(shape if grad else (0,), common[0].dtype)
        problem.mean, problem.loss, problem.part_means = mean, loss.data_ptr(), parts.data_ptr()
        problem.grad = gradient.data_ptr() if grad else None
        self._run(problem)
        return loss, parts, gradient

    def prepare(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *common, mean = arguments
        problem, acc, _ = self._problem(*common)
        record = _junk((self._library.kd_record_bytes(byref(problem)),), torch.uint8)
        loss, parts = _junk((), acc), _junk((4,), acc)
        problem.mean, problem.loss, problem.part_means = mean, loss.data_ptr(), parts.data_ptr()
        problem.record = record.data_ptr()
        self._run(problem)
        return loss, parts, record

    def complete(self, grad_loss: Tensor, record: Tensor, *arguments: Any) -> Tensor:
        *common, mean = arguments
        problem, _, shape = self._problem(*common)
        problem.shape.index = problem.row_beta = problem.stats = None  # the record has it all
        gradient = _junk(shape, common[0].dtype)
        problem.mean, problem.record, problem.recorded = mean, record.data_ptr(), True
        problem.grad_loss, problem.grad = grad_loss.data_ptr(), gradient.data_ptr()
        self._run(problem)
        return gradient

    def complete_alone(
        self, grad_loss: Tensor, student: Tensor, teacher: Tensor, record: Tensor, *switches: Any
    ) -> Tensor:
        """As the op has it: without what the record holds."""
        normalize, decoupled, cross_entropy, through, mean = switches
        numbers = (1.0, 1.0, 1.0, 1.0, float(cross_entropy), 0.0, 1.0, 0)
        flags = (normalize, decoupled, cross_entropy, through)
        factor = grad_loss.detach().contiguous()
        return self.complete(factor, record, student.detach(), teacher, None, None, None, *numbers, *flags, mean)

    def forward(self, *common: Any) -> tuple[Tensor, Tensor]:
        problem, acc, (rows, _) = self._problem(*common)
        losses, parts = _junk((rows,), acc), _junk((4, rows), acc)
        problem.row_losses, problem.row_parts = losses.data_ptr(), parts.data_ptr()
        self._run(problem)
        return losses, parts

    def sums(self, weight: Tensor, *common: Any) -> Tensor:
        problem, acc, (_, classes) = self._problem(*common)
        out = _junk((2, classes), acc)
        problem.row_weight, problem.col_sums = weight.data_ptr(), out.data_ptr()
        self._run(problem)
        return out

    def backward(self, weight: Tensor, *arguments: Any) -> Tensor:
        *common, sums, count = arguments
        problem, _, shape = self._problem(*common)
        gradient = _junk(shape, common[0].dtype)
        problem.row_weight, problem.grad = weight.data_ptr(), gradient.data_ptr()
        problem.sums, problem.count = _pointer(sums), _pointer(count)
        self._run(problem)
        return gradient

    def col_stats(self, z: Tensor, index: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        count, mean, m2 = (_junk(size, torch.float64) for size in ((), (z.shape[1],), (z.shape[1],)))
        logits, shape = Logits(z.data_ptr(), z.stride(0)), _shape(z, index, ignore_index)
        problem = ColStats(shape, logits, count.data_ptr(), mean.data_ptr(), m2.data_ptr())
        workspace = _junk((self._library.kd_stats_bytes(byref(problem)),), torch.uint8)
        assert self._library.kd_col_stats(byref(problem), c_void_p(workspace.data_ptr())) == 0
        return count, mean, m2

    def _problem(self, *common: Any) -> tuple[Problem, torch.dtype, tuple[int, int]]:
        student, teacher, index, row_beta, stats, *numbers = common
        temperature, alpha, beta, kd_weight, ce_weight, smoothing, eps, ignore_index, normalize, *switches = numbers
        decoupled, cross_entropy, through = switches
        acc = torch.promote_types(student.dtype, torch.float32)
        stats = None if stats is None else stats.double().contiguous()
        self._kept = [z for z in (row_beta, stats) if z is not None]  # the problem holds their addresses alone
        problem = Problem(
            shape=_shape(student, index, ignore_index),
            student=Logits(student.data_ptr(), student.stride(0)),
            teacher=Logits(teacher.data_ptr(), teacher.stride(0)),
            row_beta=_pointer(row_beta), stats=_pointer(stats),
            temperature=temperature, alpha=alpha, beta=beta, kd_weight=kd_weight,
            ce_weight=ce_weight if cross_entropy else 0, smoothing=smoothing, eps=eps,
            normalize=normalize, decoupled=decoupled, cross_entropy=cross_entropy, through=through,
        )  # fmt: skip
        return problem, acc, tuple(student.shape)

    def _run(self, problem: Problem) -> None:
        size = self._library.kd_workspace_bytes(byref(problem))
        guard = 256
        workspace = _junk((size + guard,), torch.uint8)
        junk = workspace[size:].clone()
        assert self._library.kd_run(byref(problem), c_void_p(workspace.data_ptr())) == 0
        assert torch.equal(workspace[size:], junk), "written beyond the workspace"


def _shape(z: Tensor, index: Tensor | None, ignore_index: int) -> Shape:
    return Shape(z.shape[0], z.shape[1], DTYPES[z.dtype], _pointer(index), ignore_index)


def _pointer(z: Tensor | None) -> int | None:
    return None if z is None else z.data_ptr()


def _junk(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    bytes_of = torch.empty(size, dtype=dtype)
    bytes_of.view(-1).view(torch.uint8).fill_(0x7F)
    return bytes_of


# the losses on them: what kdcore/losses/compiled.py calls instead of torch.ops.kdcore


class _Prepared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Emulated, student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        loss, parts, record = ops.prepare(student, *rest)
        ctx.save_for_backward(student, record)
        ctx.mark_non_differentiable(parts)
        ctx.call = ops, rest
        return loss, parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (student, record), (ops, rest) = ctx.saved_tensors, ctx.call
        return None, ops.complete(grads[0].contiguous(), record, student, *rest), *[None] * len(rest)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Emulated, student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        rows, parts = ops.forward(student, *rest)
        ctx.save_for_backward(student)
        ctx.mark_non_differentiable(parts)
        ctx.call = ops, rest
        return rows, parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (student,), (ops, rest) = ctx.saved_tensors, ctx.call
        return None, ops.backward(grads[0].contiguous(), student, *rest, None, None), *[None] * len(rest)


def call_of(ops: Emulated) -> Any:
    """``compiled._call`` on these ops, with the gradient that CUDA tensors have."""

    def call(name: str, tensors: tuple[Any, ...], numbers: tuple[Any, ...], rest: tuple[Any, ...]) -> Any:
        arguments = [z if z is None or z.dim() != 2 or z.stride(1) == 1 else z.contiguous() for z in tensors]
        if name == "forward":
            return _Rows.apply(ops, *arguments, *numbers, *rest)
        *switches, grad = rest
        if not grad:
            return ops.fused(*arguments, *numbers, *switches, False)
        return *_Prepared.apply(ops, *arguments, *numbers, *switches), None

    return call
