"""From a data set to three checked splits, their statistics and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..codec import digest
from ..seeds import derive
from .checks import check_monitor, checked
from .types import DataInfo, Dataset, Split, Splits


def load_splits(build: Callable[[Any], Dataset], options: Any, *, monitor: float, split_seed: int, name: str) -> Splits:
    """Builds a data set, checks it and carves the monitor split out of its training data, unless it brings one.

    Args:
        build: a registered data set.
        options: its validated options.
        monitor: share of every training class that is held out, in (0, 1); unused if the data set brings the split.
        split_seed: chooses which; not the run's seed, so that runs of different seeds share the split.
        name: the data set's name, for errors.

    Raises:
        DataError: the data are not what training needs; names the split and the sample.
    """
    dataset = checked(build(options), name)
    train, held_out = _carved(dataset, monitor, split_seed, name)
    channels, height, width = train.images.shape[1:]
    content = fingerprint(dataset.classes, train, held_out, dataset.test)
    if dataset.mean is not None and dataset.std is not None:
        mean, std = dataset.mean, dataset.std
        content = digest([content, mean, std])
    else:
        assert isinstance(train.images, Tensor), "images that are read come with their mean"
        mean, std = statistics(train.images)
    return Splits(
        train=train,
        monitor=held_out,
        test=dataset.test,
        info=DataInfo((channels, height, width), dataset.classes),
        mean=mean,
        std=std,
        fingerprint=content,
        carved=dataset.monitor is None,
    )


def _carved(dataset: Dataset, share: float, seed: int, name: str) -> tuple[Split, Split]:
    """Train and monitor split."""
    if dataset.monitor is not None:
        return dataset.train, dataset.monitor
    labels = dataset.train.labels
    check_monitor(labels, share, name)
    rest, held = stratified(labels, share, seed, "monitor")
    return dataset.train.take(rest), dataset.train.take(held)


def stratified(labels: Tensor, share: float, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Splits positions into (rest, held), the same share of every class, each in ascending order.

    A class of one sample stays in ``rest``; any other has at least one sample on both sides. Depends on nothing but
    the arguments: each class is drawn with its own generator.

    Args:
        labels: [N], int64, on the host.
        share: of each class that goes to ``held``, rounded.
        seed: together with ``purpose`` and the class it seeds the draw.
        purpose: keeps splits with one seed apart.
    """
    counts = labels.bincount().tolist()
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, members in enumerate(torch.split(labels.argsort(stable=True), counts)):
        generator = torch.Generator().manual_seed(derive(seed, purpose, label))
        chosen = torch.randperm(len(members), generator=generator)[: _held(len(members), share)]
        held[members[chosen]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _held(count: int, share: float) -> int:
    return min(max(round(count * share), 1), count - 1) if count > 1 else 0


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images [N, C, H, W], of images / 255 if uint8.

    A constant channel gets the deviation 1, so that normalising it gives zeros. The result does not depend on the
    number of threads.
    """
    measure = _moments_uint8 if images.dtype == torch.uint8 else _moments_float
    pairs = [measure(images[:, channel]) for channel in range(images.shape[1])]
    return tuple(mean for mean, _ in pairs), tuple(std if std > 1e-6 else 1.0 for _, std in pairs)


def _moments_uint8(pixels: Tensor) -> tuple[float, float]:
    # a histogram is exact and has no float copy, which would be 4 times the data
    share = pixels.flatten().bincount(minlength=256).double() / pixels.numel()
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = float(share @ value)
    return mean, float(share @ (value - mean) ** 2) ** 0.5


def _moments_float(pixels: Tensor) -> tuple[float, float]:
    array = pixels.numpy()  # numpy sums in one thread, so always in the same order
    return float(array.mean(dtype="float64")), float(array.std(dtype="float64"))


def fingerprint(classes: int, *splits: Split) -> str:
    """sha256 (hex) over the number of classes and over shape, dtype and bytes of every tensor.

    Images that are read count by their own fingerprint instead of by their bytes.
    """
    total = hashlib.sha256(f"{classes}\n".encode())
    for split in splits:
        for tensor in (split.images, split.labels):
            total.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
            if isinstance(tensor, Tensor):
                total.update(memoryview(tensor.contiguous().numpy()))  # type: ignore[arg-type]
            else:
                total.update(tensor.fingerprint.encode())
    return total.hexdigest()
