"""Writes a model in another format, reads it again, and compares: only a file that gives the same logits stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import NumericError, PluginError
from ..files import appearing
from ..origin import blame
from ..registry import Entry
from .classifier import Classifier

TOLERANCE = 1e-4
"""The largest difference of a logit, as a share of the largest logit, or of 1 if that is smaller."""


class Exporter(Protocol):
    """A registered exporter: a class that is constructed with its options. ``suffix`` is its files', with the dot."""

    suffix: str

    def export(self, module: Classifier, images: Tensor, path: Path) -> None:
        """Writes one file that gives the logits [B, classes] of images [B, C, H, W], whatever B is.

        Args:
            module: in evaluation mode, on the CPU. ``module.card`` says what its images are; ``module.network`` is the
                network without the normalisation, which belongs into the file.
            images: an example of at least 2.
            path: where to write; no other file is kept.
        """
        ...

    def load(self, path: Path, module: Classifier) -> Callable[[Tensor], Tensor]:
        """The function from images to logits that the file at ``path`` holds.

        It is compared with ``module``, which is given for formats that hold no more than weights.
        """
        ...


@dataclass(frozen=True)
class Match:
    """How far a file that was read again is from its module, on ``batch`` images, all in the units of a logit."""

    batch: int
    difference: float
    tolerance: float


def export(module: Classifier, entry: Entry, options: Any, path: Path, batch: int) -> list[Match]:
    """Writes ``module`` to ``path`` by a registered exporter, if what is read back is the same.

    Args:
        module: what :func:`kdcore.load_model` gives.
        entry: of the exporter.
        options: the exporter's.
        path: a file there is replaced at the end.
        batch: size of the example, from 2; compared are batches of 1 and of this.

    Raises:
        PluginError: the model cannot be traced, or the file gives other logits or classes.
        StorageError: it cannot be written. In every case ``path`` is as it was.
    """
    images = module.example(batch)
    with blame(entry.origin, f"exporting with {entry.full_name!r}"), torch.no_grad():
        exporter: Exporter = entry.load()(options)
        with appearing(path) as temporary:
            exporter.export(module, images, temporary)
            found = exporter.load(temporary, module)
            return [_compare(module, found, images[:size], entry) for size in (1, batch)]


def _compare(module: Classifier, found: Callable[[Tensor], Tensor], images: Tensor, entry: Entry) -> Match:
    where, size = f"exporter {entry.full_name!r}", len(images)
    expected, logits = module(images), found(images)
    if not torch.isfinite(expected).all():
        raise NumericError(f"logits of {size} random images are not finite", where=f"model {module.card.model!r}")
    if not isinstance(logits, Tensor) or logits.shape != expected.shape:
        shape = getattr(logits, "shape", type(logits).__name__)
        raise PluginError(f"the file gives {shape} for {size} images, not {tuple(expected.shape)}", where=where)
    tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
    difference = (logits - expected).abs().max().item()
    if not difference <= tolerance:  # NaN is no number below it
        what = f"the file gives other logits: {difference:.2g} away for {size} images, tolerance {tolerance:.2g}"
        raise PluginError(what, where=where, fix="Nothing was kept; the format or its exporter lost something.")
    if not torch.equal(logits.argmax(1), expected.argmax(1)):
        raise PluginError(f"the file gives another class to one of {size} images", where=where)
    return Match(size, difference, tolerance)
