"""A person's own data, in the forms that people have, as a :class:`kdcore.Dataset`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .checks import check_shapes
from .types import Dataset, Split

Tell: TypeAlias = Callable[[str, int, int], None]
"""Told of progress: the split's name, samples read, samples in all."""

COLOURS = (1, 3, 4)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
LOOKED_AT_TWICE = 32
TOLD_EVERY = 256
ADVICE = "Leave random augmentation out of it and name it in transforms=: kdcore redraws it every epoch."


def own_dataset(
    train: Any,
    test: Any,
    monitor: Any,
    *,
    classes: int | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    tell: Tell,
) -> Dataset:
    """Reads what was given for each split once.

    Args:
        train: a torch ``Dataset`` of (image, label) pairs, a pair (images, labels), a :class:`Split`, or a
            :class:`Dataset` that holds all splits.
        test: likewise; None with a :class:`Dataset`.
        monitor: likewise; None to carve it out of ``train``.
        classes: None to count them from the labels.
        mean: per channel or for all; None for 0 if images are floating, and for the train split's if they are uint8.
        std: likewise, and 1.
        tell: told of progress.

    Raises:
        DataError: names the split and the sample.
    """
    if isinstance(train, Dataset):
        if test is not None:
            fix = "Leave test out, or give train as a Split."
            raise DataError("train is a kdcore.Dataset, which has a test split", where="distill(test=...)", fix=fix)
        found = train
    else:
        if test is None:
            raise DataError("missing", where="distill(test=...)", fix="Give data that nothing is decided on.")
        found = Dataset(read(train, "train", tell), read(test, "test", tell), 0)
    if monitor is not None:
        found = replace(found, monitor=read(monitor, "monitor", tell))
    splits = [split for split in (found.train, found.test, found.monitor) if split is not None]
    for split in splits:
        check_shapes(split.images, split.labels, "distill(train=...)")
    counted = found.classes or 1 + max(int(split.labels.max()) for split in splits)
    return _normalised(replace(found, classes=classes or counted), mean, std)


def _normalised(data: Dataset, mean: Any, std: Any) -> Dataset:
    """The data set with its mean and deviation settled, unless they are to be the train split's."""
    channels = data.train.images.shape[1]
    if (mean is None) != (std is None):
        raise DataError("only one of mean and std is given", where="distill(mean=..., std=...)", fix="Give both.")
    if mean is None and (data.mean is not None or not data.train.images.dtype.is_floating_point):
        return data
    mean, std = (0.0, 1.0) if mean is None else (mean, std)
    return replace(data, mean=_per_channel(mean, channels), std=_per_channel(std, channels))


def _per_channel(value: Any, channels: int) -> tuple[float, ...]:
    numbers = [float(number) for number in np.asarray(value, dtype=float).reshape(-1)]
    return tuple(numbers * channels if len(numbers) == 1 else numbers)


# ---------------------------------------------------------------- reading


def read(given: Any, name: str, tell: Tell) -> Split:
    """One split, in memory: images [N, C, H, W] uint8 or floating, labels [N] int64."""
    where = f"distill({name}=...)"
    if isinstance(given, Split):
        found = given
    elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor | np.ndarray):
        found = Split(_images(given[0], where), _labels(given[1], where))
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        found = _collect(given, name, where, tell)
    else:
        fix = "Give a torch Dataset with a length, a pair (images, labels), or a kdcore.Split."
        raise DataError(f"{type(given).__name__} is no data set", where=where, fix=fix)
    check_shapes(found.images, found.labels, where)
    return found


def _images(images: Any, where: str) -> Tensor:
    """[N, H, W], [N, C, H, W], or of numpy [N, H, W, C], as [N, C, H, W]."""
    found = _from_numpy(images, where) if isinstance(images, np.ndarray) else images
    if found.ndim == 3:
        return found[:, None]
    if isinstance(images, np.ndarray) and found.ndim == 4:
        return found.movedim(_channel_axis(images.shape[1:], where) + 1, 1)
    return found


def _from_numpy(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """A tensor of its own memory where torch cannot share the array's: one that is reversed, or cannot be written."""
    try:
        return torch.from_numpy(array if array.flags.c_contiguous and array.flags.writeable else array.copy("C"))
    except TypeError as error:
        raise DataError(f"an array of {array.dtype}", where=where, fix="Give numbers.") from error


def _labels(labels: Any, where: str) -> Tensor:
    try:
        found = _from_numpy(labels, where) if isinstance(labels, np.ndarray) else torch.as_tensor(labels)
        return found.long() if found.dtype in UNSIGNED else found
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels are no tensor: {error}", where=where, fix="Give one class number a sample.") from error


def _channel_axis(shape: tuple[int, ...], where: str) -> int:
    """Where the channels of a numpy image are: last, as PIL and OpenCV have them, or else first."""
    if shape[-1] in COLOURS and shape[0] in COLOURS and shape[-1] != shape[0]:
        what = f"the channels of an array of shape {shape} may be its first axis or its last"
        raise DataError(what, where=where, fix="Give a tensor [C, H, W].")
    if shape[-1] in COLOURS:
        return len(shape) - 1
    if shape[0] in COLOURS:
        return 0
    raise DataError(f"an array of shape {shape} has no axis of 1, 3 or 4", where=where, fix="Give a tensor [C, H, W].")


def _collect(data: Any, name: str, where: str, tell: Tell) -> Split:
    """Every sample of a map-style data set into tensors that are made after the first one."""
    total = len(data)
    if total == 0:
        raise DataError("it has no samples", where=where, fix="Give at least one.")
    first, _ = _sample(data, 0, where)
    images = torch.empty(total, *first.shape, dtype=first.dtype)
    labels = torch.empty(total, dtype=torch.int64)
    for number in range(total):
        image, labels[number] = _sample(data, number, where)
        if image.shape != first.shape or image.dtype != first.dtype:
            what = (
                f"sample {number} is {tuple(image.shape)} {image.dtype}, the first {tuple(first.shape)} {first.dtype}"
            )
            raise DataError(what, where=where, fix="Resize and convert in the data set.")
        images[number] = image
        if number % TOLD_EVERY == 0:
            tell(name, number, total)
    for number in _spread(total):
        image, label = _sample(data, number, where)
        if label != labels[number] or not _same(image, images[number]):
            raise DataError(f"sample {number} is another one when it is read again", where=where, fix=ADVICE)
    return Split(images, labels)


def _same(image: Tensor, other: Tensor) -> bool:
    """True if all pixels are equal; one that is NaN in both is found later, by its sample."""
    return image.shape == other.shape and bool(((image == other) | (image != image)).all())


def _spread(total: int) -> Iterator[int]:
    """Some samples, the first among them: so many that a flip with probability one half shows."""
    step = max(1, total // LOOKED_AT_TWICE)
    yield from range(0, total, step)


def _sample(data: Any, number: int, where: str) -> tuple[Tensor, int]:
    sample = data[number]
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        what = f"sample {number} is {type(sample).__name__}, not a pair"
        raise DataError(what, where=where, fix="Give (image, label) pairs.")
    try:
        label = operator.index(sample[1])
    except TypeError:
        what = f"sample {number} has the label {sample[1]!r}"
        raise DataError(what, where=where, fix="Give one class number a sample.") from None
    return _image(sample[0], f"{where}, sample {number}"), label


def _image(image: Any, where: str) -> Tensor:
    """A tensor [H, W] or [C, H, W], an array [H, W], [H, W, C] or [C, H, W], or a PIL image, as [C, H, W]."""
    if isinstance(image, Tensor):
        found = image.detach().cpu()
    elif isinstance(image, np.ndarray):
        found = _from_numpy(image, where)
    elif getattr(image, "mode", "") in ("L", "RGB", "RGBA"):
        found = torch.from_numpy(np.array(image))
    elif hasattr(image, "mode"):
        raise DataError(f"a PIL image of mode {image.mode!r}", where=where, fix='Convert it: image.convert("RGB").')
    else:
        raise DataError(
            f"the image is {type(image).__name__}", where=where, fix="Give a tensor, an array or a PIL image."
        )
    if found.is_floating_point():
        found = found.float()
    if found.ndim == 2:
        return found[None]
    if found.ndim != 3:
        fix = "Give [C, H, W]."
        raise DataError(f"the image has shape {tuple(found.shape)}", where=where, fix=fix)
    return found if isinstance(image, Tensor) else found.movedim(_channel_axis(tuple(found.shape), where), 0)
