"""Augmentation of a whole batch on its device. Every draw is a function of the sample and the epoch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Options
from .options import CutoutOptions, ShiftOptions
from .random import Random
from .types import Batch


def shift(images: Tensor, random: Random, options: ShiftOptions) -> Tensor:
    """Translates each image by up to ``options.pixels`` in both directions, zeros outside: pad-and-crop.

    Args:
        images: [B, C, H, W].
        random: one stream of numbers a sample.
        options: how far.

    Returns:
        [B, C, H, W] of the same dtype; one padded copy and one gather.
    """
    pixels = options.pixels
    height, width = images.shape[2:]
    top = random.integers("shift.y", 0, 2 * pixels + 1)
    left = random.integers("shift.x", 0, 2 * pixels + 1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    source = rows[:, :, None] * (width + 2 * pixels) + columns[:, None, :]  # [B, H, W] into a padded plane
    padded = F.pad(images, [pixels] * 4).flatten(2)
    return padded.gather(2, source.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


class Shift:
    """The transform ``shift``."""

    def __init__(self, options: ShiftOptions) -> None:
        self.options = options

    def __call__(self, batch: Batch, random: Random) -> Batch:
        return replace(batch, inputs=shift(batch.inputs, random, self.options))


class Flip:
    """The transform ``flip``."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, batch: Batch, random: Random) -> Batch:
        return replace(batch, inputs=flip(batch.inputs, random, self.options))


def flip(images: Tensor, random: Random, options: Options) -> Tensor:
    """Mirrors each image [B, C, H, W] left to right with probability one half."""
    mirrored = random.uniform("flip") < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


class Cutout:
    """The transform ``cutout``."""

    def __init__(self, options: CutoutOptions) -> None:
        self.options = options

    def __call__(self, batch: Batch, random: Random) -> Batch:
        return replace(batch, inputs=cutout(batch.inputs, random, self.options))


def cutout(images: Tensor, random: Random, options: CutoutOptions) -> Tensor:
    """Zeros, which are the mean colour, in a square of each image (DeVries & Taylor 2017, arXiv 1708.04552).

    Its centre is any pixel of the image; what of the square lies outside is cut off.

    Args:
        images: [B, C, H, W], normalised.
        random: one stream of numbers a sample.
        options: how large.
    """
    height, width = images.shape[2:]
    rows, columns = (_near(random, f"cutout.{axis}", n, options.size) for axis, n in (("y", height), ("x", width)))
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _near(random: Random, lane: str, length: int, size: int) -> Tensor:
    """[B, length] bool, True in the ``size`` pixels around a centre, be they fewer at a border."""
    first = random.integers(lane, 0, length)[:, None] - size // 2
    pixels = torch.arange(length, device=first.device)
    return (pixels >= first) & (pixels < first + size)
