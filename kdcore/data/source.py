"""Where batches come from: a source gives the batch of any step, without state to save."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, PluginError
from ..options import Options as NoOptions
from ..seeds import derive
from .loading import Feed, Reader, Request, read_batches
from .random import Random
from .residency import Ahead
from .types import Batch, Split, Splits, TrainData

Transform: TypeAlias = Callable[[Batch, Random], Batch]
"""A registered transform with its options: it may change inputs and target."""


@dataclass(frozen=True)
class SourceContext:
    """What a source is built with.

    Args:
        data: the checked training split with its statistics, on any device.
        seed: the run's seed.
        batch_size: samples a step.
        drop_last: leave out a ragged last batch.
        transforms: augmentations, in order.
        device: where batches are wanted.
        workers: processes that read ahead where images are :class:`kdcore.Images`; 0 to read in this one.
        views: augmentations repeat after so many epochs; 0 for new ones in every epoch.
        resident: the training images may be put on the device; they fit there.
    """

    data: TrainData
    seed: int
    batch_size: int
    drop_last: bool
    transforms: tuple[Transform, ...]
    device: torch.device
    workers: int = 0
    views: int = 0
    resident: bool = True


class Source(Protocol):
    """Gives batches. ``knobs`` holds what ``Set("data.NAME", value)`` may change, with its current value.

    A source whose batches are samples of the training split also has ``walk(parts, epoch)``, which gives a batch for
    each [B] positions of a list, as they are augmented in ``epoch``: teachers' outputs are cached by it.

    A source that cannot be a pure function of the step (a replay buffer, an iterator) also has ``state_dict`` and
    ``load_state_dict`` with a flat dict of tensors and JSON values; they go into checkpoints. One that holds processes
    or files has ``close()``, which is called when the stage ends, however it ends.
    """

    steps_per_epoch: int
    knobs: dict[str, Any]

    def batch(self, step: int) -> Batch:
        """The batch of a step of the stage, from 0: a pure function of ``step`` and ``knobs``."""


@dataclass(frozen=True)
class Normalizer:
    """Images to float32 with mean 0 and deviation 1 per channel over the train split."""

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    @classmethod
    def of(cls, splits: Splits | TrainData, device: torch.device | str) -> Normalizer:
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (splits.mean, splits.std))
        return cls(mean[:, None, None], std[:, None, None])

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] uint8 or float32 -> a new [B, C, H, W] float32."""
        scaled = images.float().div_(255) if images.dtype == torch.uint8 else images
        return scaled.sub(self.mean).div_(self.std)


class EpochSource:
    """The training split, shuffled anew every epoch.

    A tensor is resident on the device if it fits there (uint8 stays uint8), else batches come from the host, one ahead.
    Images that are read are read ahead by processes.

    The order is a function of (run seed, data fingerprint, epoch), an augmentation one of (run seed, sample, epoch).
    Images are normalised before the transforms run, so zeros that a transform fills in are the mean colour.

    Args:
        options: none.
        context: data, batch size, device.

    Raises:
        DataError: an epoch would have no step.
    """

    Options: ClassVar[type[NoOptions]] = NoOptions

    def __init__(self, options: NoOptions, context: SourceContext) -> None:
        self.context = context
        split = context.data.split
        self.train = (
            split.to(context.device) if context.resident else Split(split.images, split.labels.to(context.device))
        )
        self.steps_per_epoch = _steps(len(self.train), context.batch_size, context.drop_last)
        self.knobs: dict[str, Any] = {}
        self._normalize = Normalizer.of(context.data, context.device)
        self._augment_seed = derive(context.seed, "augment")
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))
        self._host_order = self._order
        images = self.train.images
        self._feed = None if isinstance(images, Tensor) else self._fed(Reader(images, self._augment_seed))
        self._ahead = None
        if isinstance(images, Tensor) and not context.resident:
            self._ahead = Ahead(images, context.device, self._host_index)

    def batch(self, step: int) -> Batch:
        epoch = step // self.steps_per_epoch
        index = self._part(self._epoch_order(epoch), step)
        return self._augmented(self._images(step, index), index, epoch)

    def walk(self, parts: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """The samples at each of ``parts`` [B] int64, as they are augmented in an epoch."""
        for index, images in zip(parts, self._read(parts, epoch), strict=True):
            yield self._augmented(images, index.to(self.context.device), epoch)

    def _read(self, parts: Sequence[Tensor], epoch: int) -> Iterator[Tensor]:
        images, context = self.train.images, self.context
        if isinstance(images, Tensor):
            return (images.index_select(0, index.to(images.device)).to(context.device) for index in parts)
        requests: Iterator[Request] = ((index.cpu().numpy(), self._view(epoch)) for index in parts)
        return read_batches(Reader(images, self._augment_seed), requests, context.workers, context.device)

    def _view(self, epoch: int) -> int:
        """Epochs of one view are augmented alike."""
        return epoch % self.context.views if self.context.views else epoch

    def _augmented(self, images: Tensor, index: Tensor, epoch: int) -> Batch:
        batch = Batch(self._normalize(images), self.train.labels[index], index, epoch)
        for transform in self.context.transforms:
            batch = transform(batch, Random(self._augment_seed, batch.index, self._view(epoch)))
            if not isinstance(batch, Batch):
                where = f"transform {type(transform).__module__}:{type(transform).__qualname__}"
                raise PluginError(f"gave {type(batch).__name__}", where=where, fix="It must give a kdcore.Batch.")
        return batch

    def _epoch_order(self, epoch: int) -> Tensor:
        # 8 bytes a sample are drawn on the host and copied once an epoch: a GPU's own permutation would differ
        if self._order[0] != epoch:
            self._order = (epoch, self._drawn(epoch).to(self.context.device))
        return self._order[1]

    def _drawn(self, epoch: int) -> Tensor:
        seed = derive(self.context.seed, "order", self.context.data.fingerprint, epoch)
        return torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))

    def _part(self, order: Tensor, step: int) -> Tensor:
        start = step % self.steps_per_epoch * self.context.batch_size
        return order[start : start + self.context.batch_size]

    def _images(self, step: int, index: Tensor) -> Tensor:
        if self._ahead is not None:
            return self._ahead.at(step)
        if self._feed is not None:
            return self._feed.at(step)
        assert isinstance(self.train.images, Tensor)
        return self.train.images.index_select(0, index)

    def _fed(self, reader: Reader) -> Feed:
        return Feed(lambda step: read_batches(reader, self._requests(step), self.context.workers, self.context.device))

    def _requests(self, first: int) -> Iterator[Request]:
        """The batches from a step on, without end: the next epoch is read while this one is evaluated."""
        for step in itertools.count(first):
            yield self._host_index(step).numpy(), self._view(step // self.steps_per_epoch)

    def _host_index(self, step: int) -> Tensor:
        epoch = step // self.steps_per_epoch
        if self._host_order[0] != epoch:
            self._host_order = (epoch, self._drawn(epoch))
        return self._part(self._host_order[1], step)

    def close(self) -> None:
        """Ends the processes that read ahead."""
        if self._feed is not None:
            self._feed.close()


def _steps(samples: int, batch_size: int, drop_last: bool) -> int:
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}", where="data.batch_size", fix="Use at least 1.")
    steps = samples // batch_size if drop_last else -(-samples // batch_size)
    if steps == 0:
        what = f"batch_size {batch_size} with drop_last leaves no step: the train split has {samples} samples"
        raise DataError(what, where="data.batch_size", fix=f"Use at most {samples}, or drop_last = false.")
    return steps


def eval_batches(
    split: Split, splits: Splits, device: torch.device | str, size: int = 512, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split in order, normalised and not augmented: (inputs [B, C, H, W] float32, target [B] int64).

    Args:
        split: one of ``splits``.
        splits: whose statistics normalise.
        device: where batches are wanted.
        size: samples a batch; the last may have fewer.
        workers: processes that read ahead where images are read.
    """
    normalize = Normalizer.of(splits, device)
    parts = [slice(start, start + size) for start in range(0, len(split), size)]
    for part, images in zip(parts, _in_order(split, parts, torch.device(device), workers), strict=True):
        yield normalize(images), split.labels[part].to(device)


def _in_order(split: Split, parts: list[slice], device: torch.device, workers: int) -> Iterator[Tensor]:
    if isinstance(split.images, Tensor):
        return (split.images[part].to(device) for part in parts)
    requests: Iterator[Request] = ((np.arange(*part.indices(len(split))), None) for part in parts)
    workers = min(workers, len(parts)) if len(parts) > 1 else 0  # one batch has nothing to be read ahead of
    return read_batches(Reader(split.images), requests, workers, device)
