"""One batch in the hands of several processes: what they tell each other for its class statistics and its mean.

A rank tells count, mean and squared deviations of each class of its rows forward, and two sums for each class backward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .normalise import keep
from .reference import Settings


def merged(
    rows: Tensor,  # 0-d
    mean: Tensor,  # [K, C]
    m2: Tensor,  # [K, C]
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:  # 0-d, [K, C], [K, C], float64
    """Count, mean and sum of squared deviations over the group, the same bits on every rank.

    Chan, Golub, LeVeque 1979, from one message of 1 + 2 K C numbers a rank.
    """
    own = torch.cat([part.double().flatten() for part in (rows, mean, m2)])
    size = dist.get_world_size(group)
    told = own.new_empty(size * len(own))
    dist.all_gather_into_tensor(told, own, group=group)
    rows, each, spread = torch.split(told.view(size, -1), [1, mean.numel(), m2.numel()], dim=1)
    total = rows.sum()
    middle = (rows * each).sum(0) / total.clamp(min=1)
    m2 = spread.sum(0) + (rows * (each - middle).square()).sum(0)
    return total, middle.view_as(mean), m2.view_as(mean)


def share(
    student: Tensor,  # [B, C]
    valid: Tensor | None,  # [B] bool
    group: dist.ProcessGroup,
) -> Tensor:  # 0-d, float64
    """What this rank's mean is multiplied by, so that the mean over ranks is the mean over all rows that count."""
    rows = _rows(student, valid).double()
    total = rows.clone()
    dist.all_reduce(total, group=group)
    return dist.get_world_size(group) * rows / total.clamp(min=1)


def with_statistics(
    settings: Settings,
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    valid: Tensor | None,  # [B] bool
    group: dist.ProcessGroup,
) -> Settings:
    """The settings with the group's class statistics as given ones, for plain torch."""
    if settings.normalize != "class" or not isinstance(settings.stats, str):
        return settings
    stats = Moments.apply(student, teacher, valid, group)
    return replace(settings, stats=tuple(part.detach() for part in stats) if settings.stats == "detached" else stats)


def _rows(student: Tensor, valid: Tensor | None) -> Tensor:
    return torch.tensor(len(student), device=student.device) if valid is None else valid.sum()


class Moments(torch.autograd.Function):
    """Mean and biased variance of each class over the group, [C] each, of student and of teacher.

    Backward gives each rank the gradient of the sum of all ranks' losses.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, valid: Tensor | None, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        rows = _rows(student, valid)
        z = torch.stack([keep(side.detach().double(), valid) for side in (student, teacher)])  # [2, B, C]
        mean = z.sum(1) / rows.clamp(min=1)
        m2 = keep(z - mean[:, None], valid).square().sum(1)
        total, mean, m2 = merged(rows, mean, m2, group)
        ctx.group, ctx.valid = group, valid
        ctx.save_for_backward(student, teacher, mean, total)
        variance = m2 / total.clamp(min=1)
        return mean[0], variance[0], mean[1], variance[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, mean, total = ctx.saved_tensors
        summed = torch.stack(grads)
        dist.all_reduce(summed, group=ctx.group)
        found = []
        for needed, z, m, (to_mean, to_variance) in zip(
            ctx.needs_input_grad, (student, teacher), mean, summed.view(2, 2, -1), strict=False
        ):
            each = (to_mean + 2 * to_variance * (z - m)) / total.clamp(min=1)
            found.append(keep(each, ctx.valid).to(z.dtype) if needed else None)
        return *found, None, None


class Rows(torch.autograd.Function):
    """``kdcore::forward`` with statistics of the group, whose derivative adds up the sums over classes in the group."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, rest, total, group = arguments
        loss, parts = torch.ops.kdcore.forward(*tensors, *rest)
        ctx.save_for_backward(*tensors, total.to(loss.dtype))
        ctx.rest, ctx.group = rest, group
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, total = ctx.saved_tensors
        sums = torch.ops.kdcore.sums(grad, *tensors, *ctx.rest)
        dist.all_reduce(sums, group=ctx.group)
        return torch.ops.kdcore.backward(grad, *tensors, *ctx.rest, sums, total), *[None] * 7
