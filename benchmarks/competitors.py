"""What kdcore's losses are measured against: other ways to compute the same objective, and the machine's limits.

Every one is called as `way(student, teacher, labels)` and gives a scalar loss with a graph. They differ in who would
have written them:

* textbook: the formulas of the papers, one after the other, as research code publishes them;
* careful A and B: someone who knows the numerics and counts passes (A: torch's fused functions; B: the teacher's
  part without a graph and the divergence from two sums); the better of both counts;
* liger: LigerKLDIVLoss of liger_kernel, where that is installed;
* analytic: loss and gradient derived by hand, one graph without autograd: the most one can give to torch.compile.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.losses import dkd_loss, kd_loss

CLASS_EPS, INSTANCE_EPS = 1e-5, 1e-7  # kdcore's defaults
SAFE_EXPONENT = 60.0  # below it exp needs no maximum in float32, whatever the sum

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What is computed; the batch mean of everything."""

    decoupled: bool = True  # DKD, otherwise KD
    normalize: str = "class"
    cross_entropy: bool = False  # in the same call, at weight 1
    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0

    @property
    def name(self) -> str:
        return f"{'DKD' if self.decoupled else 'KD'} {self.normalize}{' + CE' if self.cross_entropy else ''}"


def contenders(objective: Objective, names: tuple[str, ...]) -> dict[str, Way]:
    """Those named "eager X", "compile X" or "reduce X"; the compiled ones compile at their first call."""
    return {name: _contender(objective, *name.split(" ", 1)) for name in names}


def _contender(objective: Objective, how: str, which: str) -> Way:
    function: Callable[..., Any] = partial(SOURCES[which], objective=objective)
    if how != "eager":
        mode = "reduce-overhead" if how == "reduce" else None  # in CUDA graphs of torch's own
        function = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
    return partial(Analytic.apply, function) if which == "analytic" else function


# -- ours


def ours(objective: Objective, backend: str) -> Way:
    shared = {
        "temperature": objective.temperature,
        "normalize": objective.normalize,
        "ce_weight": float(objective.cross_entropy),
        "backend": backend,
    }
    if objective.decoupled:
        return partial(dkd_loss, alpha=objective.alpha, beta=objective.beta, **shared)
    if objective.cross_entropy:
        return partial(kd_loss, **shared)
    return lambda student, teacher, labels: kd_loss(student, teacher, **shared)


def raw_call(objective: Objective) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The op itself: loss, parts and gradient in one call, straight to the kernel of the tensors' device."""
    op = torch.ops.kdcore.fused.default._handle.redispatch_boxed
    eps = {"none": CLASS_EPS, "class": CLASS_EPS, "instance": INSTANCE_EPS}[objective.normalize]
    mode = ("none", "class", "instance").index(objective.normalize)
    weights = (objective.temperature, objective.alpha, objective.beta, 1.0, float(objective.cross_entropy), 0.0, eps)
    switches = (-100, mode, objective.decoupled, objective.cross_entropy, True, True, True)  # from ignore_index to grad
    labelled = objective.decoupled or objective.cross_entropy
    devices = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}
    keys = {device: torch._C.DispatchKeySet(key) for device, key in devices.items()}

    def call(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = keys[student.device.type]
        found: tuple[Tensor, Tensor, Tensor] = op(
            key, student, teacher, labels if labelled else None, None, None, *weights, *switches
        )
        return found

    return call


def autograd_alone() -> Callable[[], None]:
    """The cheapest call that torch can differentiate, and backward(): what no loss can do without."""
    number = torch.ones((), requires_grad=True)

    def call() -> None:
        number.grad = None
        number.neg().backward()

    return call


# -- textbook


def textbook(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    temperature = objective.temperature
    s, t = (_plainly_normalised(z, objective.normalize) / temperature for z in (student, teacher))
    if objective.decoupled:
        loss = _textbook_dkd(s, t, labels, objective)
    else:
        loss = F.kl_div(F.log_softmax(s, dim=1), F.softmax(t, dim=1), reduction="batchmean") * temperature**2
    return loss + F.cross_entropy(student, labels) if objective.cross_entropy else loss


def _textbook_dkd(s: Tensor, t: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    target = F.one_hot(labels, s.shape[1]).bool()
    rest = ~target
    p_s, p_t = s.softmax(dim=1), t.softmax(dim=1)
    binary_s, binary_t = (
        torch.cat([(p * target).sum(1, keepdim=True), (p * rest).sum(1, keepdim=True)], dim=1) for p in (p_s, p_t)
    )
    tckd = F.kl_div(binary_s.log(), binary_t, reduction="batchmean")
    without_target_s, without_target_t = s - 1000.0 * target, t - 1000.0 * target
    nckd = F.kl_div(without_target_s.log_softmax(dim=1), without_target_t.softmax(dim=1), reduction="batchmean")
    return (objective.alpha * tckd + objective.beta * nckd) * objective.temperature**2


def _plainly_normalised(z: Tensor, normalize: str) -> Tensor:
    if normalize == "class":
        return (z - z.mean(0, keepdim=True)) / torch.sqrt(z.var(0, keepdim=True, unbiased=False) + CLASS_EPS)
    if normalize == "instance":
        return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + INSTANCE_EPS)
    return z


# -- careful


def careful_a(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    u, v = (_fused_normalised(z, objective) for z in (student, teacher))
    if objective.decoupled:
        column = labels[:, None]
        rest_s, rest_t = _without(u, column), _without(v, column)
        nckd = F.kl_div(rest_s.log_softmax(1), rest_t.log_softmax(1), reduction="sum", log_target=True)
        d_s, d_t = (w.gather(1, column) - r.logsumexp(1, True) for w, r in ((u, rest_s), (v, rest_t)))
        divergence = objective.alpha * _binary_kl(d_s, d_t) + objective.beta * nckd
    else:
        divergence = F.kl_div(u.log_softmax(1), v.log_softmax(1), reduction="sum", log_target=True)
    return _mean_loss(divergence, student, labels, objective)


def careful_b(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """KL(q_t || q_s) = sum q_t (v - u) - M_t + M_s: the student's side needs one weighted sum and one log-sum-exp."""
    u = _fused_normalised(student, objective)
    column = labels[:, None]
    with torch.no_grad():
        v = _fused_normalised(teacher, objective)
        rest_t = _without(v, column) if objective.decoupled else v
        m_t = rest_t.logsumexp(1, True)
        q_t = (rest_t - m_t).exp_()
        teacher_term = (q_t * v).sum(1, True) - m_t
        d_t = v.gather(1, column) - m_t
    m_s = (_without(u, column) if objective.decoupled else u).logsumexp(1, True)
    divergence = (teacher_term + m_s - (q_t * u).sum(1, True)).sum()
    if objective.decoupled:
        d_s = u.gather(1, column) - m_s
        divergence = objective.alpha * _binary_kl(d_s, d_t) + objective.beta * divergence
    return _mean_loss(divergence, student, labels, objective)


def _fused_normalised(z: Tensor, objective: Objective) -> Tensor:
    """Normalised logits over T, in float32, by torch's fused functions; layer_norm's deviation is the biased one."""
    z, (_, classes) = z.float(), z.shape
    if objective.normalize == "class":
        return F.batch_norm(z, None, None, training=True, eps=CLASS_EPS) * (1 / objective.temperature)
    if objective.normalize == "instance":
        return F.layer_norm(z, (classes,), eps=1e-14) * ((1 - 1 / classes) ** 0.5 / objective.temperature)
    return z * (1 / objective.temperature)


def _without(u: Tensor, column: Tensor) -> Tensor:
    """The label's logit at the lowest finite number: exactly 0 after exp, and 0 * it is still 0."""
    return u.scatter(1, column, torch.finfo(u.dtype).min)


def _binary_kl(d_s: Tensor, d_t: Tensor) -> Tensor:
    """KL between [p, 1 - p] of two logits, summed."""
    hit = d_t.sigmoid() * (F.logsigmoid(d_t) - F.logsigmoid(d_s))
    miss = (-d_t).sigmoid() * (F.logsigmoid(-d_t) - F.logsigmoid(-d_s))
    return (hit + miss).sum()


def _mean_loss(divergence: Tensor, student: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    loss = divergence * (objective.temperature**2 / student.shape[0])
    return loss + F.cross_entropy(student.float(), labels) if objective.cross_entropy else loss


# -- analytic


class Analytic(torch.autograd.Function):
    """Loss and gradient are there after forward; backward hands the gradient on."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss, gradient = function(student, teacher, labels)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_loss: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        if grad_loss[0].device.type != "cpu" or grad_loss[0].item() != 1:  # reading it would wait for a GPU
            gradient = gradient * grad_loss[0].to(gradient.dtype)
        return None, gradient, None, None


def loss_and_gradient(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    rows, classes = student.shape
    s, t = student.float(), teacher.float()
    (h_s, rate), (h_t, _) = _standard(s, objective.normalize), _standard(t, objective.normalize)
    u, v = h_s * (1 / objective.temperature), h_t * (1 / objective.temperature)
    at_label = torch.arange(classes, device=s.device)[None] == labels[:, None]
    divergence, g = _divergence(u, v, at_label, labels, objective)
    loss = divergence.sum() * (objective.temperature**2 / rows)
    gradient = _through(g, h_s, rate, objective.normalize) * (objective.temperature / rows)
    if objective.cross_entropy:
        top = s.amax(1, keepdim=True)
        e = (s - top).exp()
        z = e.sum(1, keepdim=True)
        loss = loss + (z.log() + top - s.gather(1, labels[:, None])).mean()
        gradient = gradient + (e / z - at_label.float()) * (1 / rows)
    return loss, gradient.to(student.dtype)


def _standard(z: Tensor, normalize: str) -> tuple[Tensor, Tensor | None]:
    """The normalised logits h, and dh/dz at fixed statistics."""
    if normalize == "none":
        return z, None
    dim = 0 if normalize == "class" else 1
    variance, mean = torch.var_mean(z, dim, correction=dim, keepdim=True)
    rate = torch.rsqrt(variance + CLASS_EPS) if dim == 0 else 1 / (variance.sqrt() + INSTANCE_EPS)
    return (z - mean) * rate, rate


def _through(g: Tensor, h: Tensor, rate: Tensor | None, normalize: str) -> Tensor:
    """From dL/dh to dL/dz; a row of g sums to 0, a column need not."""
    if normalize == "class":
        return rate * (g - g.mean(0) - h * (g * h).mean(0))
    if normalize == "instance":
        return rate * (g - h * ((g * h).sum(1, keepdim=True) * (1 / (h.shape[1] - 1))))
    return g


def _divergence(u: Tensor, v: Tensor, at_label: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The divergence of each row, [B], and its gradient with respect to u, [B, C]."""
    skip = at_label if objective.decoupled else None
    u, v = (_shifted(w, skip, objective) for w in (u, v))
    e_s, e_t = (w.exp() if skip is None else torch.where(skip, 0.0, w.exp()) for w in (u, v))
    z_s, z_t = e_s.sum(1), e_t.sum(1)
    among = (e_t * (v - u)).sum(1) / z_t + torch.log(z_s / z_t)
    if not objective.decoupled:
        return among, e_s / z_s[:, None] - e_t / z_t[:, None]
    d_s, d_t = (w.gather(1, labels[:, None])[:, 0] - z.log() for w, z in ((u, z_s), (v, z_t)))
    hit = d_t.sigmoid() * (F.logsigmoid(d_t) - F.logsigmoid(d_s))
    miss = (-d_t).sigmoid() * (F.logsigmoid(-d_t) - F.logsigmoid(-d_s))
    label = objective.alpha * (d_s.sigmoid() - d_t.sigmoid())
    factor_s, factor_t = (objective.beta - label) / z_s, objective.beta / z_t
    others = e_s * factor_s[:, None] - e_t * factor_t[:, None]
    return objective.alpha * (hit + miss) + objective.beta * among, torch.where(skip, label[:, None], others)


def _shifted(u: Tensor, skip: Tensor | None, objective: Objective) -> Tensor:
    """By the maximum, unless normalised logits are bounded: |h| <= sqrt(n - 1) for n values (Samuelson)."""
    values = {"none": None, "class": u.shape[0], "instance": u.shape[1]}[objective.normalize]
    if values is not None and values**0.5 / objective.temperature < SAFE_EXPONENT:
        return u
    return u - (u if skip is None else torch.where(skip, -torch.inf, u)).amax(1, keepdim=True)


# -- liger


def liger(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """Its divergence takes what log_softmax gives."""
    from liger_kernel.transformers import LigerKLDIVLoss

    s, t = (F.log_softmax(z.float() * (1 / objective.temperature), dim=1) for z in (student, teacher))
    loss: Tensor = LigerKLDIVLoss(reduction="batchmean", log_target=True)(s, t) * objective.temperature**2
    return loss


SOURCES: dict[str, Callable[..., Any]] = {
    "textbook": textbook,
    "careful A": careful_a,
    "careful B": careful_b,
    "analytic": loss_and_gradient,
    "liger": liger,
}


# -- the machine's limits

LIMITS_SOURCE = """
#include <stdint.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
typedef uint64_t Line __attribute__((vector_size(64), aligned(64), may_alias));
static volatile uint64_t sink;

// n dependent additions between registers: a cycle each
void add_chain(uint64_t n) {
  uint64_t x = n, y = n;
  __asm__ volatile("" : "+r"(y));
#define ADD x += y; __asm__ volatile("" : "+r"(x));
  for (uint64_t i = 0; i < n; i += 8) { ADD ADD ADD ADD ADD ADD ADD ADD }
  sink = x;
}

static inline void put(Line* to, Line v, int streaming) {
#ifdef __SSE2__
  if (streaming) {
    for (int k = 0; k < 4; k++) _mm_stream_si128((__m128i*)to + k, ((__m128i*)&v)[k]);
    return;
  }
#endif
  *to = v;
}

// reads s and t, then reads them again and writes g
void five_passes(const Line* s, const Line* t, Line* g, int64_t lines, int streaming, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Line a = {0}, b = {0}, c = {0}, d = {0};
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < lines / 2; i++) {
      a += s[2 * i]; b += t[2 * i]; c += s[2 * i + 1]; d += t[2 * i + 1];
    }
    a += b + c + d;
    sink = a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
    if (streaming) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < lines; i++) put(g + i, s[i] + t[i], 1);
    } else {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < lines; i++) put(g + i, s[i] + t[i], 0);
    }
  }
}
"""


class Limits:
    """Clock and memory passes of this machine, by a small C helper; torch.compile needs the compiler as well."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "limits.c"), Path(folder, "limits.so")
            source.write_text(LIMITS_SOURCE)
            command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            subprocess.run([*command, str(source), "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))

    def clock_ghz(self) -> float:
        return max(self._additions_per_ns(8_000_000) for _ in range(25))

    def _additions_per_ns(self, count: int) -> float:
        start = time.perf_counter_ns()
        self._library.add_chain(ctypes.c_uint64(count))
        return count / (time.perf_counter_ns() - start)

    def five_passes(self, student: Tensor, teacher: Tensor, streaming: bool) -> Callable[[], None]:
        """Reading both arrays twice and writing a third once: a class-normalised gradient cannot move less."""
        arrays = (student.detach(), teacher, torch.empty_like(student))
        pointers = [ctypes.c_void_p(z.data_ptr()) for z in arrays]
        lines = ctypes.c_int64(student.numel() * student.element_size() // 64)

        def run(_alive: Any = arrays) -> None:
            self._library.five_passes(*pointers, lines, int(streaming), self.threads)

        return run
