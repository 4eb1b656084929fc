"""Where batches come from: a source gives the batch of any step, without state to save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from ..errors import DataError, PluginError
from ..options import Options as NoOptions
from ..seeds import derive
from .random import Random
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
    """

    data: TrainData
    seed: int
    batch_size: int
    drop_last: bool
    transforms: tuple[Transform, ...]
    device: torch.device


class Source(Protocol):
    """Gives batches. ``knobs`` holds what ``Set("data.NAME", value)`` may change, with its current value.

    A source that cannot be a pure function of the step (a replay buffer, an iterator) also has ``state_dict`` and
    ``load_state_dict`` with a flat dict of tensors and JSON values; they go into checkpoints.
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
    """The training split, shuffled anew every epoch, resident on the device (uint8 stays uint8 there).

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
        self.train = context.data.split.to(context.device)
        self.steps_per_epoch = _steps(len(self.train), context.batch_size, context.drop_last)
        self.knobs: dict[str, Any] = {}
        self._normalize = Normalizer.of(context.data, context.device)
        self._augment_seed = derive(context.seed, "augment")
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def batch(self, step: int) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.context.batch_size
        index = self._epoch_order(epoch)[position * size : (position + 1) * size]
        samples = self.train.take(index)
        batch = Batch(self._normalize(samples.images), samples.labels, index, epoch)
        for transform in self.context.transforms:
            batch = transform(batch, Random(self._augment_seed, batch.index, epoch))
            if not isinstance(batch, Batch):
                where = f"transform {type(transform).__module__}:{type(transform).__qualname__}"
                raise PluginError(f"gave {type(batch).__name__}", where=where, fix="It must give a kdcore.Batch.")
        return batch

    def _epoch_order(self, epoch: int) -> Tensor:
        # 8 bytes a sample are drawn on the host and copied once an epoch: a GPU's own permutation would differ
        if self._order[0] != epoch:
            seed = derive(self.context.seed, "order", self.context.data.fingerprint, epoch)
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
            self._order = (epoch, order.to(self.context.device))
        return self._order[1]


def _steps(samples: int, batch_size: int, drop_last: bool) -> int:
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}", where="data.batch_size", fix="Use at least 1.")
    steps = samples // batch_size if drop_last else -(-samples // batch_size)
    if steps == 0:
        what = f"batch_size {batch_size} with drop_last leaves no step: the train split has {samples} samples"
        raise DataError(what, where="data.batch_size", fix=f"Use at most {samples}, or drop_last = false.")
    return steps


def eval_batches(
    split: Split, splits: Splits, device: torch.device | str, size: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split in order, normalised and not augmented: (inputs [B, C, H, W] float32, target [B] int64).

    Args:
        split: one of ``splits``.
        splits: whose statistics normalise.
        device: where batches are wanted.
        size: samples a batch; the last may have fewer.
    """
    normalize = Normalizer.of(splits, device)
    for start in range(0, len(split), size):
        part = slice(start, start + size)
        yield normalize(split.images[part].to(device)), split.labels[part].to(device)
