"""The values that data code passes on: splits, what a model must know about them, and a batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .random import Random

SplitName: TypeAlias = Literal["train", "monitor", "test"]


@runtime_checkable
class Images(Protocol):
    """Images that are read when they are wanted, since together they do not fit into memory.

    Worker processes read batches ahead, so ``read`` depends on its arguments alone; the object is forked, not pickled.
    Hold paths and the like in arrays: Python objects that are touched are copied into every worker.
    """

    shape: tuple[int, int, int, int]
    """[N, C, H, W] of all that can be read."""
    dtype: torch.dtype
    """uint8."""
    fingerprint: str
    """sha256 (hex) of all that decides what ``read`` gives; part of a stage's key."""

    def read(self, index: Tensor, random: Random | None) -> Tensor:
        """The images at ``index`` [B], int64, on the host: [B, C, H, W] uint8.

        Args:
            index: positions from 0 to N - 1.
            random: one stream of numbers a sample for the training view, such as a random crop; None for the
                evaluation view.

        Raises:
            DataError: names the file that cannot be read.
        """


@dataclass(frozen=True)
class Taken:
    """Some of other images, in an order of their own; nothing is copied."""

    images: Images
    index: Tensor  # [M], int64, on the host

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.index), *self.images.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.fingerprint.encode() + self.index.numpy().tobytes()).hexdigest()

    def read(self, index: Tensor, random: Random | None) -> Tensor:
        return self.images.read(self.index[index], random)


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        images: [N, C, H, W], uint8 (0..255) or float32; or :class:`Images`, which are read when they are wanted.
        labels: [N], int64, each in [0, classes).
    """

    images: Tensor | Images
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str) -> Split:
        """The split on ``device``; images that are read stay on the host."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return Split(images, self.labels.to(device))

    def take(self, index: Tensor) -> Split:
        """The samples at ``index`` [M], int64, in its order."""
        if not isinstance(self.images, Tensor):
            return Split(Taken(self.images, index.cpu()), self.labels[index])  # type: ignore[arg-type]
        return Split(self.images.index_select(0, index), self.labels[index])  # copies whole images: 4 times faster


@dataclass(frozen=True)
class Dataset:
    """What a registered data set's ``build(options)`` returns.

    Args:
        train: what is trained on.
        test: looked at once, for the report.
        classes: the number of classes.
        monitor: what decisions are made on; None to carve the recipe's share out of ``train``.
        mean: per channel, what is subtracted from an image (from image / 255 if it is uint8); None for the mean of the
            training split.
        std: per channel, what the difference is divided by; given with ``mean`` or not at all.
    """

    train: Split
    test: Split
    classes: int
    monitor: Split | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


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
        monitor: every decision is made on it.
        test: looked at once, for the report.
        info: what a model gets.
        mean: per channel, over the train split unless the data set gives it; of images / 255 if they are uint8.
        std: as ``mean``, never 0.
        fingerprint: sha256 (hex) of the number of classes, of all three splits and of a given mean and deviation; part
            of a stage's key.
        carved: True if the monitor split was held out of the training data, False if the data set brought it.
    """

    train: Split
    monitor: Split
    test: Split
    info: DataInfo
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    carved: bool = True

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
        target: [B], int64; [B, classes] float32 where a transform mixed labels; None where a source has none.
        index: [B], int64, position in the train split.
        epoch: the epoch that the batch belongs to, from 0; fractional for a source without epochs.
    """

    inputs: Tensor
    target: Tensor
    index: Tensor
    epoch: float
