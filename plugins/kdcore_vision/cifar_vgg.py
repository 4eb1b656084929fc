"""VGG of the CIFAR zoo, with batch norm and one linear layer (Simonyan and Zisserman, 2015)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from kdcore import DataError, DataInfo

from .cifar_parts import he_with_a_small_head, norm_paths, tap_paths
from .families import GlobalPool

WIDTHS = (64, 128, 256, 512, 512)
SMALLEST = 8
FOURTH_POOL = 64


class VGG(nn.Module):
    """Five groups of 3x3 convolutions with a max-pool between them; the first group is the stem.

    The map is not halved before the last group: 32x32 images end in 4x4, as in the field's tables. From 64 pixels on it
    is.

    Args:
        depths: convolutions of each group.
        data: shape and classes.
    """

    def __init__(self, depths: tuple[int, int, int, int, int], data: DataInfo) -> None:
        super().__init__()
        if min(data.shape[1:]) < SMALLEST:
            what = f"images are {data.shape[1]}x{data.shape[2]}: nothing is left of them after three halvings"
            raise DataError(what, where="model 'cifar_vgg*'", fix=f"Use images of {SMALLEST}x{SMALLEST} or more.")
        before = data.shape[0]
        for group, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            setattr(self, f"block{group}", convolutions(before, width, depth))
            before = width
        self.relu = nn.ModuleList(nn.ReLU() for _ in WIDTHS)
        halve_again = min(data.shape[1:]) >= FOURTH_POOL
        self.halve = nn.ModuleList(
            [*(nn.MaxPool2d(2) for _ in range(3)), nn.MaxPool2d(2) if halve_again else nn.Identity()]
        )
        self.pool = GlobalPool()
        self.classifier = nn.Linear(before, data.classes)
        self.taps = tap_paths("relu.0", [(f"block{stage}", f"relu.{stage}") for stage in (1, 2, 3, 4)])
        self.norms = norm_paths(f"block{stage}.{3 * depths[stage] - 2}" for stage in (1, 2, 3, 4))
        self.apply(he_with_a_small_head)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        x = self.halve[0](self.relu[0](self.block0(images)))
        x = self.halve[1](self.relu[1](self.block1(x)))
        x = self.halve[2](self.relu[2](self.block2(x)))
        x = self.halve[3](self.relu[3](self.block3(x)))
        logits: Tensor = self.classifier(self.pool(self.relu[4](self.block4(x))))
        return logits


def convolutions(before: int, width: int, depth: int) -> nn.Sequential:
    """``depth`` times convolution, batch norm and ReLU, but for the last ReLU."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers[:-1])


BUILDERS: dict[str, Callable[[DataInfo], nn.Module]] = {
    "cifar_vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "cifar_vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "cifar_vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "cifar_vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "cifar_vgg19": partial(VGG, (2, 2, 4, 4, 4)),
}
