"""The values that data code passes on: splits, what a model must know about them, and a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

SplitName: TypeAlias = Literal["train", "monitor", "test"]


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        images: [N, C, H, W], uint8 (0..255) or float32.
        labels: [N], int64, each in [0, classes).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> Split:
        """The samples at ``index`` [M], int64, in its order."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """What a registered data set's ``build(options)`` returns. The monitor split is carved out of ``train`` later."""

    train: Split
    test: Split
    classes: int


@dataclass(frozen=True)
class DataInfo:
    """What a model's ``build(options, data)`` gets: the shape of one image (C, H, W) and the number of classes."""

    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class Splits:
    """A checked data set in three disjoint splits.

    Args:
        train: what gradients are computed on.
        monitor: held out of the training data; every decision is made on it.
        test: looked at once, for the report.
        info: what a model gets.
        mean: per channel, over the train split; of images / 255 if they are uint8.
        std: as ``mean``, never 0.
        fingerprint: sha256 (hex) of the number of classes and of all three splits; part of a stage's key.
    """

    train: Split
    monitor: Split
    test: Split
    info: DataInfo
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    def to(self, device: torch.device | str) -> Splits:
        """The same splits on ``device``; no copy where they are there already."""
        return replace(self, train=self.train.to(device), monitor=self.monitor.to(device), test=self.test.to(device))

    @property
    def for_training(self) -> TrainData:
        """What a source may see."""
        return TrainData(self.train, self.info, self.mean, self.std, self.fingerprint)

    def majority(self, split: SplitName) -> float:
        """Share of the most frequent class: the accuracy of a constant answer."""
        chosen: Split = getattr(self, split)
        return int(chosen.labels.bincount().max()) / len(chosen)


@dataclass(frozen=True)
class TrainData:
    """What a source gets of :class:`Splits`: neither the monitor nor the test split.

    Args:
        split: the training split.
        info: shape and classes.
        mean: as in :class:`Splits`.
        std: as in :class:`Splits`.
        fingerprint: of the whole data set.
    """

    split: Split
    info: DataInfo
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str


@dataclass(frozen=True)
class Batch:
    """One step's samples, on the device.

    Args:
        inputs: [B, C, H, W], float32, normalised and augmented.
        target: [B], int64; [B, C] float where a transform mixed labels; None where a source has none.
        index: [B], int64, position in the train split.
        epoch: the epoch that the batch belongs to, from 0; fractional for a source without epochs.
    """

    inputs: Tensor
    target: Tensor
    index: Tensor
    epoch: float
