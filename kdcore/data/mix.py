"""Transforms that mix samples or copy them: ``mixup``, ``cutmix`` and ``views``.

A sample is mixed with the one after it in its batch, the last one with the first. Batches are shuffled, so that is any
other sample, and the same one whenever the batch is asked for again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from ..seeds import derive
from ..transforms import TransformContext
from .options import MixUpOptions, ViewsOptions
from .random import Random
from .source import Transform
from .types import Batch

QUANTILES = 4097


class Mix:
    """What both kinds of mixing share: whose share is how large, and the labels that follow from it.

    Args:
        options: how far to mix, and how often.
        classes: the number of classes C.
    """

    lane: str

    def __init__(self, options: MixUpOptions, classes: int) -> None:
        self.options, self.classes = options, classes
        self._quantiles = beta_quantiles(options.alpha)

    @classmethod
    def build(cls, options: MixUpOptions, context: TransformContext) -> Self:
        return cls(options, context.info.classes)

    def shares(self, random: Random) -> Tensor:
        """[B] float32: how much of a sample is its own, Beta(alpha, alpha), or 1 where it is left alone."""
        self._quantiles = self._quantiles.to(random.index.device)  # a copy at the first batch alone
        share = interpolate(self._quantiles, random.uniform(self.lane))
        return torch.where(random.uniform(f"{self.lane}.p") < self.options.p, share, 1.0)

    def labels(self, target: Tensor, share: Tensor) -> Tensor:
        """Labels [B] or [B, C] as [B, C] float32, mixed like the samples; None stays None."""
        return target if target is None else blend(soft(target, self.classes), share)


class MixUp(Mix):
    """The transform ``mixup``: a weighted mean of two images (Zhang et al., ICLR 2018, arXiv 1710.09412)."""

    lane = "mixup"

    def __call__(self, batch: Batch, random: Random) -> Batch:
        share = self.shares(random)
        return replace(batch, inputs=blend(batch.inputs, share), target=self.labels(batch.target, share))


class CutMix(Mix):
    """The transform ``cutmix``: a box of another image (Yun et al., ICCV 2019, arXiv 1905.04899).

    The box has the image's proportions and any place; what of it lies outside is cut off, and the labels follow the
    pixels that remain.
    """

    lane = "cutmix"

    def __call__(self, batch: Batch, random: Random) -> Batch:
        height, width = batch.inputs.shape[2:]
        side = (1 - self.shares(random)).sqrt()
        rows, columns = (_span(random, f"cutmix.{axis}", side, n) for axis, n in (("y", height), ("x", width)))
        box = rows[:, :, None] & columns[:, None, :]  # [B, H, W], True where the other image shows
        share = (height * width - box.sum((1, 2))) / (height * width)
        inputs = torch.where(box[:, None], batch.inputs.roll(-1, 0), batch.inputs)
        return replace(batch, inputs=inputs, target=self.labels(batch.target, share))


class Views:
    """The transform ``views``: two copies of the batch, augmented apart; the weak one is the first half.

    Both halves keep labels and positions. A transform before or after it treats both alike: a sample's random numbers
    are the same in both. The weak one's are those that it would have without views.
    """

    def __init__(self, weak: tuple[Transform, ...], strong: tuple[Transform, ...], classes: int) -> None:
        self.weak, self.strong, self.classes = weak, strong, classes

    @classmethod
    def build(cls, options: ViewsOptions, context: TransformContext) -> Self:
        return cls(context.inner["weak"], context.inner["strong"], context.info.classes)

    def __call__(self, batch: Batch, random: Random) -> Batch:
        weak = _apply(self.weak, batch, random.seed, random.epoch)
        strong = _apply(self.strong, batch, derive(random.seed, "strong"), random.epoch)
        inputs, index = torch.cat([weak.inputs, strong.inputs]), torch.cat([weak.index, strong.index])
        return replace(batch, inputs=inputs, index=index, target=self._labels(weak.target, strong.target))

    def _labels(self, weak: Tensor, strong: Tensor) -> Tensor:
        if weak is None:
            return weak
        if weak.dim() != strong.dim():  # one side is mixed
            weak, strong = soft(weak, self.classes), soft(strong, self.classes)
        return torch.cat([weak, strong])


def soft(target: Tensor, classes: int) -> Tensor:
    """Labels [B] int64, or [B, C] already, as [B, C] float32."""
    return (target if target.dim() == 2 else F.one_hot(target, classes)).float()


def blend(
    x: Tensor,  # [B, ...]
    share: Tensor,  # [B]
) -> Tensor:
    """``share x + (1 - share)`` times the next sample; a new tensor."""
    share = share.view(-1, *[1] * (x.dim() - 1))
    return share * x + (1 - share) * x.roll(-1, 0)


def beta_quantiles(alpha: float) -> Tensor:
    """[QUANTILES] float32: the values below which 0, 1/4096, ..., 1 of Beta(alpha, alpha) lie."""
    return torch.from_numpy(betaincinv(alpha, alpha, np.linspace(0, 1, QUANTILES))).float()


def interpolate(
    quantiles: Tensor,  # [Q]
    u: Tensor,  # [B], in [0, 1)
) -> Tensor:  # [B]
    """The quantile at u, linear between two."""
    place = u * (len(quantiles) - 1)
    low = place.long()
    return torch.lerp(quantiles[low], quantiles[low + 1], place - low)


def _span(random: Random, lane: str, side: Tensor, length: int) -> Tensor:
    """[B, length], True from half a side before a random place to half a side after it."""
    size = (side * length).round().long()[:, None]
    first = random.integers(lane, 0, length)[:, None] - size // 2
    place = torch.arange(length, device=side.device)
    return (place >= first) & (place < first + size)


def _apply(transforms: tuple[Transform, ...], batch: Batch, seed: int, epoch: int) -> Batch:
    for transform in transforms:
        batch = transform(batch, Random(seed, batch.index, epoch))
    return batch
