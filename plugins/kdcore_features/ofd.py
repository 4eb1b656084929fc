"""A comprehensive overhaul of feature distillation (Heo et al., ICCV 2019, arXiv:1904.01866, section 3).

Features before the activation are compared: the teacher's through a margin ReLU, max(t, m) with a negative margin for
each channel, the student's through a 1x1 convolution and a batch norm. A negative response that the student is below,
too, costs nothing (partial L2).
"""

from __future__ import annotations

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .maps import as_map, map_shape
from .options import OFDOptions
from .pairs import features, pairs, taps

RARE = 1e-3  # negative responses below this share say nothing about their mean


def ofd(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Partial L2, 0-d: with u = max(t, m), the sum over C, H, W of (s - u)^2 where s > u or t > 0, mean over B.

    Args:
        student: s, [B, C, H, W], after the connector.
        teacher: t, [B, C, h, w]; averaged to H x W.
        margin: m, [C], at most 0.
    """
    if teacher.shape != student.shape:
        teacher = F.adaptive_avg_pool2d(teacher, student.shape[-2:])
    target = torch.maximum(teacher, margin[:, None, None])
    counts = (student > target) | (teacher > 0)
    return torch.where(counts, (student - target).square(), 0.0).sum() / len(student)


def margin_of(weight: Tensor, bias: Tensor) -> Tensor:
    """The mean negative response [C] of a channel whose batch norm has this weight and bias.

    E[z | z < 0] of z ~ N(b, w^2) is b - |w| phi(b / |w|) / Phi(-b / |w|); -3 |w| where hardly any z is negative.
    """
    deviation, mean = weight.double().abs(), bias.double()
    ratio = mean / deviation
    share = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.where(share > RARE, mean - deviation * density / share, -3 * deviation).float()


class Known(nn.Module):
    """A margin that follows from the source's batch norm."""

    def __init__(self, margin: Tensor) -> None:
        super().__init__()
        self.register_buffer("margin", margin)

    def forward(self, teacher: Tensor) -> Tensor:
        return self.margin


class Measured(nn.Module):
    """A margin for a source that names no batch norm: the mean of its negative responses, this batch's among them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("total", "count"):  # in float64, since float32 counts to 2^24 only
            self.register_buffer(name, torch.zeros(channels, dtype=torch.float64))

    def forward(self, teacher: Tensor) -> Tensor:
        """[B, C, H, W] -> [C]."""
        total = self.total + teacher.clamp(max=0).sum((0, 2, 3))
        count = self.count + (teacher < 0).sum((0, 2, 3))
        if self.training:
            self.total, self.count = total, count
        return (total / count.clamp(min=1)).to(teacher.dtype)


class OFD(nn.Module):
    """The registered loss ``ofd``: the sum over stages, a stage counting half as much as the next deeper one."""

    needs = frozenset({"taps"})

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.pairs = pairs(shapes)
        own = [map_shape(shapes.student, pair[0]) for pair in self.pairs]
        other = [map_shape(shapes.teacher, pair[1]) for pair in self.pairs]
        self.connectors = nn.ModuleList(connector(s[0], t[0]) for s, t in zip(own, other, strict=True))
        self.margins = nn.ModuleList(
            Known(margin_of(*shapes.norms[pair[1]])) if pair[1] in shapes.norms else Measured(shape[0])
            for pair, shape in zip(self.pairs, other, strict=True)
        )
        self.min_batch = 2 if (1, 1) in [shape[1:] for shape in own] else 1  # one value has no variance

    @classmethod
    def build(cls, shapes: Shapes, options: OFDOptions) -> Self:
        return cls(shapes)

    taps = staticmethod(taps)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        found = []
        for pair, connect, margin in zip(self.pairs, self.connectors, self.margins, strict=True):
            own, other = map(as_map, features(student, teacher, pair))
            found.append(ofd(connect(own), other, margin(other)))
        return sum(part / 2**i for i, part in enumerate(reversed(found)))


def connector(own: int, other: int) -> nn.Sequential:
    """From the student's channels to the teacher's."""
    conv = nn.Conv2d(own, other, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(other))
