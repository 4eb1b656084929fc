"""Checks of a data set, before anything is trained on it. Every error names the split and the sample."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .types import Dataset, Images, Split

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def checked(dataset: Any, name: str) -> Dataset:
    """``dataset`` with int64 labels and uint8 or float32 images, on the host.

    Args:
        dataset: what a builder returned.
        name: the data set's name, for errors.

    Raises:
        DataError: names the data set, the split and the first bad sample.
    """
    where = f"data set {name!r}"
    if not isinstance(dataset, Dataset):
        raise DataError(f"the builder returned {type(dataset).__name__}", where=where, fix="Return a kdcore.Dataset.")
    if dataset.classes < 2:
        raise DataError(f"{dataset.classes} classes", where=where, fix="A classifier needs at least 2.")
    train = _checked_split(dataset.train, dataset.classes, f"{where}, train split")
    test = _checked_split(dataset.test, dataset.classes, f"{where}, test split")
    monitor = dataset.monitor
    if monitor is not None:
        monitor = _checked_split(monitor, dataset.classes, f"{where}, monitor split")
        _check_alike(train, monitor, f"{where}, monitor split")
    _check_alike(train, test, f"{where}, test split")
    _check_moments(dataset, train.images.shape[1], where)
    return replace(dataset, train=train, test=test, monitor=monitor)


def _check_alike(train: Split, other: Split, where: str) -> None:
    expected, found = tuple(train.images.shape[1:]), tuple(other.images.shape[1:])
    if expected != found or train.images.dtype != other.images.dtype:
        what = f"images are {found} {other.images.dtype}, those of train {expected} {train.images.dtype}"
        raise DataError(what, where=where, fix="Give all splits one shape and dtype.")


def _check_moments(dataset: Dataset, channels: int, where: str) -> None:
    mean, std = dataset.mean, dataset.std
    if mean is None and std is None:
        if not isinstance(dataset.train.images, Tensor):
            fix = "Give the Dataset a mean and a std: these images are not counted through."
            raise DataError("no mean and no std", where=where, fix=fix)
        return
    if mean is None or std is None or not len(mean) == len(std) == channels:
        what = f"mean is {mean} and std is {std} for {channels} channels"
        raise DataError(what, where=where, fix="Give both, with one number a channel, or neither.")
    if not all(math.isfinite(m) and math.isfinite(s) and s > 0 for m, s in zip(mean, std, strict=True)):
        fix = "Give finite numbers, and deviations above 0."
        raise DataError(f"mean is {mean} and std is {std}", where=where, fix=fix)


def _checked_split(split: Split, classes: int, where: str) -> Split:
    check_shapes(split.images, split.labels, where)
    labels = _integers(split.labels, where)
    check_labels(labels, classes, where)
    images = _pixels(split.images, where)
    return Split(images, labels)


def check_shapes(images: Tensor | Images, labels: Tensor, where: str) -> None:
    """Images must be [N, C, H, W] and labels [N], with N > 0."""
    for kind, value, known in (("images", images, Tensor | Images), ("labels", labels, Tensor)):
        if not isinstance(value, known):
            raise DataError(f"{kind} are {type(value).__name__}", where=where, fix="Give a torch tensor.")
    if len(images.shape) != 4:
        fix = "Give [N, C, H, W]; grey images have C = 1."
        raise DataError(f"images have shape {tuple(images.shape)}", where=where, fix=fix)
    if labels.ndim != 1:
        fix = "Give [N]: one class number a sample, not one-hot."
        raise DataError(f"labels have shape {tuple(labels.shape)}", where=where, fix=fix)
    if images.shape[0] != len(labels):
        first = min(images.shape[0], len(labels))
        what = f"{images.shape[0]} images but {len(labels)} labels: sample {first} has only one of them"
        raise DataError(what, where=where, fix="Give one label an image.")
    if math.prod(images.shape) == 0:
        what = f"no pixels: images have shape {tuple(images.shape)}"
        raise DataError(what, where=where, fix="Change the options of the data set (the keys of `data`).")


def _integers(labels: Tensor, where: str) -> Tensor:
    if labels.dtype not in INTEGERS:
        raise DataError(f"labels are {labels.dtype}, not integers", where=where, fix="Give class numbers as int64.")
    return labels.to(device="cpu", dtype=torch.int64)


def check_labels(labels: Tensor, classes: int, where: str) -> None:
    """Every label [N] must lie in [0, classes)."""
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        first = _first(bad)
        what = f"sample {first} has label {int(labels[first])} ({int(bad.sum())} such samples)"
        raise DataError(what, where=where, fix=f"With {classes} classes labels run from 0 to {classes - 1}.")


def _pixels(images: Tensor | Images, where: str) -> Tensor | Images:
    if not isinstance(images, Tensor):
        _check_read(images, where)
        return images
    if images.dtype == torch.uint8:
        return images.to("cpu").contiguous()
    if not images.is_floating_point():
        raise DataError(f"images are {images.dtype}", where=where, fix="Give uint8 (0..255) or float32.")
    images = images.to(device="cpu", dtype=torch.float32).contiguous()
    bad = ~images.isfinite().flatten(1).all(1)
    if bad.any():
        what = f"sample {_first(bad)} has pixels that are NaN or infinite ({int(bad.sum())} such samples)"
        raise DataError(what, where=where, fix="Remove or repair them.")
    return images


def _check_read(images: Images, where: str) -> None:
    if images.dtype != torch.uint8:
        raise DataError(f"images that are read are {images.dtype}", where=where, fix="Give uint8 (0..255).")
    if not re.fullmatch(r"[0-9a-f]{64}", str(images.fingerprint)):
        fix = "Give 64 hex digits: the sha256 of all that decides what read() gives."
        raise DataError(f"the fingerprint is {images.fingerprint!r}", where=where, fix=fix)


def _first(bad: Tensor) -> int:
    return int(bad.int().argmax())  # argmax gives the first of equal values


def check_monitor(labels: Tensor, share: float, name: str) -> None:
    """``share`` of the training labels [N] must leave samples on both sides.

    Raises:
        DataError: names the split that would be empty and the key to change.
    """
    if not 0 < share < 1:
        empty = "train" if share >= 1 else "monitor"
        what = f"monitor = {share} leaves the {empty} split empty"
        raise DataError(
            what, where=f"data set {name!r}", fix="Write a share between 0 and 1, such as data.monitor = 0.1."
        )
    if int(labels.bincount().max()) < 2:
        what = f"the monitor split is empty: no class of the train split has 2 samples ({len(labels)} in all)"
        raise DataError(what, where=f"data set {name!r}", fix="Use more training samples.")
