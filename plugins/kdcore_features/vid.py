"""Variational information distillation (Ahn et al., CVPR 2019, arXiv:1904.05835, section 2)."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .adapters import Adapted, Shape, adapters, to_smaller
from .maps import is_map
from .options import VIDOptions
from .pairs import Pair, pairs, total


def vid_loss(mean: Tensor, teacher: Tensor, log_scale: Tensor, *, eps: float = 1e-5) -> Tensor:
    """The mean over all elements of ((mean - teacher)^2 / v + log v) / 2, with v = softplus(log_scale) + eps a channel.

    Args:
        mean: [B, C, H, W], [B, N, C] or [B, C], what the student predicts of the teacher's feature.
        teacher: the same shape.
        log_scale: [C]; finite for every value, for softplus is log(exp(log_scale) + exp(0)) in log space.
        eps: the smallest variance.
    """
    variance = torch.logaddexp(log_scale, torch.zeros_like(log_scale)) + eps
    variance = variance.view(-1, 1, 1) if mean.ndim == 4 else variance
    return 0.5 * ((mean - teacher).square() / variance + variance.log()).mean()


def predictor(student: Shape, teacher: Shape) -> nn.Module:
    """The mean of the Gaussian, for maps: three 1x1 convolutions without biases, and ReLU between them."""
    convolutions = [nn.Conv2d(n, teacher[0], 1, bias=False) for n in (student[0], teacher[0], teacher[0])]
    first, second, third = convolutions
    return nn.Sequential(to_smaller(student, teacher), first, nn.ReLU(), second, nn.ReLU(), third)


class VID(Adapted):
    """The registered loss ``vid``: the sum over its taps. The log-scales are trained with the student.

    Args:
        found: taps that correspond.
        predictors: of the mean, one for each pair.
        channels: of the teacher's features.
        options: those of the recipe.
    """

    fixed = frozenset({"init_variance", "eps"})

    def __init__(
        self, found: tuple[Pair, ...], predictors: nn.ModuleList, channels: list[int], options: VIDOptions
    ) -> None:
        super().__init__(found, predictors)
        self.eps = options.eps
        start = _inverse_softplus(max(options.init_variance - options.eps, options.eps))
        self.log_scales = nn.ParameterList(torch.full((count,), start) for count in channels)

    @classmethod
    def build(cls, shapes: Shapes, options: VIDOptions) -> Self:
        found = pairs(shapes)
        teacher = [shapes.teacher[tap] for _, tap in found]
        channels = [shape[0] if is_map(shape) else shape[-1] for shape in teacher]
        return cls(found, adapters(shapes, found, options, predictor), channels, options)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over the batch, 0-d, in float32 or float64."""
        both = zip(self.compared(student, teacher), self.log_scales, strict=True)
        return total([vid_loss(*pair, scale, eps=self.eps) for pair, scale in both])


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
