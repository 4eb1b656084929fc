"""What is done to the logits of both sides before the temperature, and the rows that count."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Normalize

CLASS_EPS = 1e-5
INSTANCE_EPS = 1e-7


def normalise(
    z: Tensor,  # [B, C]
    mode: Normalize,
    eps: float | None = None,
    *,
    valid: Tensor | None = None,  # [B] bool
    statistics: tuple[Tensor, Tensor] | None = None,  # mean [C], variance [C]; class only
    detached: bool = False,
) -> Tensor:  # [B, C]
    """The logits h that the temperature divides."""
    if mode == "none":
        return z
    if mode == "instance":
        return _normalise_instance(z, INSTANCE_EPS if eps is None else eps)
    eps = CLASS_EPS if eps is None else eps
    if statistics is not None:
        mean, var = (part.to(z.dtype) for part in statistics)
        return (z - mean) / (var + eps).sqrt()
    shifted = z - _first_row(z, valid)
    mean, var = _moments(shifted, valid)
    if detached:
        mean, var = mean.detach(), var.detach()
    return (shifted - mean) / (var + eps).sqrt()


def class_statistics(
    z: Tensor,  # [B, C]
    valid: Tensor | None = None,  # [B] bool
) -> tuple[Tensor, Tensor]:  # [C], [C]
    """Mean and biased variance of each class over the rows that count, with their graph."""
    z = z.to(accumulator(z))
    first = _first_row(z, valid)
    mean, var = _moments(z - first, valid)
    return first.squeeze(0) + mean, var


def keep(z: Tensor, valid: Tensor | None) -> Tensor:
    return z if valid is None else z.masked_fill(~valid[:, None], 0)


def count(z: Tensor, valid: Tensor | None) -> Tensor | int:
    return max(z.shape[0], 1) if valid is None else valid.sum().clamp(min=1)


def accumulator(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _normalise_instance(z: Tensor, eps: float) -> Tensor:
    d = z - z[:, :1].detach()  # a constant row becomes exactly 0
    d = d - d.mean(1, keepdim=True)
    var = d.square().sum(1, keepdim=True) / (z.shape[1] - 1)
    flat = var == 0  # the root's derivative there is taken as 0, as torch.std does
    return d / (var.masked_fill(flat, 1).sqrt().masked_fill(flat, 0) + eps)


def _moments(z: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = count(z, valid)
    mean = keep(z, valid).sum(0) / rows
    return mean, keep((z - mean).square(), valid).sum(0) / rows


def _first_row(z: Tensor, valid: Tensor | None) -> Tensor:  # [1, C]
    """A shift that makes a constant column exactly 0, whatever its size."""
    if valid is None or z.shape[0] == 0:
        return z[:1].detach()
    return z.detach().index_select(0, valid.to(torch.uint8).argmax(0, keepdim=True))  # no sync
