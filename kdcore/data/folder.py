"""The data set ``imagefolder``: images in a folder for each class, decoded when a batch wants them.

Views are those of the published ImageNet recipes: in training a random part of random proportions, resized; in
evaluation the centre after the shorter side was resized. Both are bilinear with antialiasing, by torchvision on PIL.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..codec import digest
from ..errors import DataError
from .listing import LAYOUT, class_names, list_classes
from .options import ImageFolderOptions
from .random import Random
from .types import Dataset, Split

TRIES = 10  # at a crop that lies within the image; then the centre is taken
TWO_BYTES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def imagefolder(options: ImageFolderOptions) -> Dataset:
    """The folders ``train`` and ``val`` (or ``test``) of a root, [N, 3, size, size] uint8; classes by their names.

    Raises:
        DataError: a folder or class is missing, or a file cannot be read.
    """
    root = Path(options.root).expanduser()
    classes = class_names(root / "train")
    held = root / (options.test or ("val" if (root / "val").is_dir() else "test"))
    present = class_names(held)
    if strange := sorted(set(present) - set(classes)):
        what = f"its class {strange[0]!r} is none of train's ({len(strange)} such classes)"
        raise DataError(what, where=str(held), fix="Name the class folders of both splits alike.")
    train = _split(root / "train", classes, options, list(range(len(classes))), whole=True)
    test = _split(held, present, options, [classes.index(name) for name in present])
    return Dataset(train, test, len(classes), mean=options.mean, std=options.std)


def _split(
    folder: Path, classes: list[str], options: ImageFolderOptions, numbers: list[int], whole: bool = False
) -> Split:
    """The images of some classes, labelled with their numbers; of ``whole``, each must have images."""
    found = list_classes(folder, classes, options.verify)
    empty = [name for name, files in zip(classes, found, strict=True) if not files.count]
    if empty and (whole or len(empty) == len(classes)):
        raise DataError("no images", where=str(folder / empty[0]), fix=f"Remove the class, or add images. {LAYOUT}")
    labels = torch.tensor(numbers).repeat_interleave(torch.tensor([files.count for files in found]))
    view = View(options.size, options.resize, options.scale, options.ratio)
    names = b"".join(files.names for files in found)
    content = digest([classes, [files.content for files in found]])
    return Split(FolderImages(str(folder), names, content, view), labels)


@dataclass(frozen=True)
class View:
    """What is shown of an image; as in :class:`ImageFolderOptions`."""

    size: int
    resize: int
    scale: tuple[float, float]
    ratio: tuple[float, float]


class FolderImages:
    """The images of one split.

    Args:
        folder: of the split.
        names: paths relative to it, each with a zero byte after it: one object, not one an image.
        content: what tells the files from others.
        view: what is shown of them.
    """

    dtype = torch.uint8

    def __init__(self, folder: str, names: bytes, content: str, view: View) -> None:
        self.folder, self.names, self.view = folder, names, view
        self._ends = np.flatnonzero(np.frombuffer(names, dtype=np.uint8) == 0)
        self.shape = (len(self._ends), 3, view.size, view.size)
        self.fingerprint = digest([content, view.size, view.resize, view.scale, view.ratio])

    def path(self, index: int) -> str:
        """Where an image lies."""
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.path.join(self.folder, os.fsdecode(self.names[start : int(self._ends[index])]))

    def read(self, index: Tensor, random: Random | None) -> Tensor:
        """See :class:`kdcore.Images`."""
        paths = [self.path(i) for i in index.tolist()]
        if random is None:
            shown = [self._centre(decode(path)) for path in paths]
        else:
            crops = Crops(random, self.view)
            shown = [self._crop(decode(path), crops, number) for number, path in enumerate(paths)]
        return torch.stack([F.pil_to_tensor(image) for image in shown])

    def _centre(self, image: Image.Image) -> Image.Image:
        found: Image.Image = F.center_crop(F.resize(image, [self.view.resize]), [self.view.size] * 2)
        return found

    def _crop(self, image: Image.Image, crops: Crops, number: int) -> Image.Image:
        box = crops.box(number, image.height, image.width)
        found: Image.Image = F.resized_crop(image, *box, [self.view.size] * 2)
        return found


class Crops:
    """A random box for each sample of a batch, as Szegedy et al. (2015) have it: area and proportions are drawn.

    Args:
        random: one stream a sample.
        view: the ranges; proportions are uniform in their logarithm.
    """

    def __init__(self, random: Random, view: View) -> None:
        low, high = (math.log(ratio) for ratio in view.ratio)
        self._ratio = view.ratio
        self._shares = [random.uniform(f"crop.share.{n}", *view.scale).tolist() for n in range(TRIES)]
        self._ratios = [random.uniform(f"crop.ratio.{n}", low, high).tolist() for n in range(TRIES)]
        self._top, self._left = (random.uniform(f"crop.{side}").tolist() for side in ("top", "left"))

    def box(self, number: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a sample's box in an image of this size, in pixels."""
        for shares, ratios in zip(self._shares, self._ratios, strict=True):
            area, ratio = shares[number] * height * width, math.exp(ratios[number])
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(self._top[number] * (height - h + 1)), int(self._left[number] * (width - w + 1)), h, w
        h = min(height, max(1, round(width / self._ratio[0])))  # all of it, or its middle if it is too long
        w = min(width, max(1, round(height * self._ratio[1])))
        return (height - h) // 2, (width - w) // 2, h, w


def decode(path: str) -> Image.Image:
    """The first picture of a file as RGB; grey, CMYK and palettes are converted, transparency is dropped.

    Raises:
        DataError: names the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in TWO_BYTES:
                return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
            what = f"its pixels have more than 8 bits (PIL's mode {image.mode})"
    except MemoryError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and errors of its decoders
        what = f"cannot be read as an image: {error}"
    raise DataError(what, where=path, fix="Replace the file by an 8-bit JPEG or PNG, or remove it.")
