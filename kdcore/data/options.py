"""Options of data sets and transforms, without torch, so that a recipe is checked quickly."""

from __future__ import annotations

from math import inf
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, model_validator

from ..options import Field, Options


class DigitsOptions(Options):
    test: float = Field(0.2, gt=0, lt=1, description="the share of each class that becomes the test split, such as 0.2")


class SyntheticOptions(Options):
    samples: int = Field(2000, ge=2, description="the number of training samples, monitor split included")
    test_samples: int = Field(500, ge=1, description="the number of test samples")
    classes: int = Field(10, ge=2, description="the number of classes, at least 2")
    channels: int = Field(3, ge=1, description="the number of channels, such as 3")
    size: int = Field(16, ge=4, description="the height and width of an image in pixels, at least 4")
    noise: float = Field(1.0, ge=0, description="the deviation of the noise, 0 or more (the signal's is 1)")
    data_seed: int = Field(0, ge=0, description="a number that selects the data; the run's seed does not")


class TorchvisionOptions(Options):
    root: str = Field(min_length=1, description="the folder that torchvision reads the set from or downloads it to")
    download: bool = Field(False, description="true to download the set if it is not there")
    verify: bool = Field(
        True,
        description="false to accept CIFAR or SVHN files whose md5 is not the published one, as when their samples are "
        "in another order (CIFAR's are pickles, which can run code: only files that you trust)",
    )


class ImageFolderOptions(Options):
    root: str = Field(min_length=1, description="a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    test: str | None = Field(
        None, min_length=1, description='the folder of the test split in root; "val", or else "test", by default'
    )
    size: int = Field(224, ge=1, description="the height and width that a model gets, in pixels, such as 224")
    resize: int = Field(
        256, ge=1, description="an evaluated image's shorter side before its centre is cut out, from size"
    )
    scale: tuple[float, float] = Field(
        (0.08, 1.0),
        description="the smallest and largest share of an image that a random crop covers, such as [0.08, 1]",
    )
    ratio: tuple[float, float] = Field(
        (3 / 4, 4 / 3), description="the smallest and largest width / height of a random crop, such as [0.75, 1.333]"
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="subtracted from images in 0..1, red, green and blue; ImageNet's by default"
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="what the difference is divided by; ImageNet's by default"
    )
    verify: bool = Field(True, description="false to tell files by name and size alone, without reading them once")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.resize < self.size:
            raise ValueError(f"resize = {self.resize} is below size = {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale = {list(self.scale)} is not two shares in ascending order, above 0 and up to 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < inf:
            raise ValueError(f"ratio = {list(self.ratio)} is not two numbers above 0 in ascending order")
        return self


class ShiftOptions(Options):
    pixels: int = Field(ge=1, description="the largest shift in pixels, at least 1, such as 4 for 32x32 images")


class CutoutOptions(Options):
    size: int = Field(ge=1, description="the square's side in pixels, at least 1, such as 16 for CIFAR-10")


class MixUpOptions(Options):
    alpha: float = Field(0.2, gt=0, description="an alpha above 0; shares are drawn from Beta(alpha, alpha)")
    p: float = Field(1.0, ge=0, le=1, description="the probability that a sample is mixed, from 0 to 1")


class CutMixOptions(MixUpOptions):
    alpha: float = Field(1.0, gt=0, description="an alpha above 0; shares are drawn from Beta(alpha, alpha)")


Named = Annotated[dict[str, Any], BeforeValidator(lambda item: {"name": item} if isinstance(item, str) else item)]


class ViewsOptions(Options):
    transforms: ClassVar[tuple[str, ...]] = ("weak", "strong")
    """The options that hold transforms."""

    copies: ClassVar[int] = 2
    """How many samples there are for one, which costs are estimated by."""

    weak: tuple[Named, ...] = Field((), description='a list like ["flip", { name = "shift", pixels = 4 }]')
    strong: tuple[Named, ...] = Field((), description='a list like ["flip", { name = "shift", pixels = 4 }]')
