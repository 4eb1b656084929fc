"""Residual networks of the CIFAR zoo: those of three narrow stages, and ResNet-50 with a 3x3 stem."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import DataInfo

from .cifar_parts import he_convolutions, norm_paths, tap_paths
from .families import GlobalPool


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, with what comes before the last activation as a module of its own."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = project(before, after, stride)
        self.pre = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.pre(out + self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; the inner ones have a quarter of the channels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        inner = after // 4
        self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.shortcut = project(before, after, stride)
        self.pre = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(self.pre(out + self.shortcut(x)))


def project(before: int, after: int, stride: int) -> nn.Module:
    """The shortcut: a 1x1 convolution where the shape changes."""
    if stride == 1 and before == after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


class ResNet(nn.Module):
    """A residual network for 32x32 images (He et al., 2016, section 4.2): a 3x3 stem and three stages.

    Args:
        blocks: basic blocks of a stage.
        widths: channels of the stem and of each stage.
        data: shape and classes.
    """

    def __init__(self, blocks: int, widths: tuple[int, int, int, int], data: DataInfo) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(data.shape[0], widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stem = nn.Identity()
        for stage, (before, after) in enumerate(pairwise(widths), start=1):
            first = BasicBlock(before, after, 1 if stage == 1 else 2)
            rest = [BasicBlock(after, after, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.pool = GlobalPool()
        self.fc = nn.Linear(widths[-1], data.classes)
        last = [f"layer{stage}.{blocks - 1}" for stage in (1, 2, 3)]
        self.taps = tap_paths("stem", [(f"{block}.pre", block.partition(".")[0]) for block in last])
        self.norms = norm_paths(f"{block}.bn2" for block in last)
        self.apply(he_convolutions)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        x = self.stem(F.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(self.pool(self.layer3(self.layer2(self.layer1(x)))))
        return logits


class ResNet50(nn.Module):
    """ResNet-50 without the first downsampling, for 32x32 images: stages of 32, 16, 8 and 4 pixels a side."""

    blocks = (3, 4, 6, 3)

    def __init__(self, data: DataInfo) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(data.shape[0], 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stem = nn.Identity()
        before, last = 64, []
        for stage, count in enumerate(self.blocks, start=1):
            after = 128 * 2**stage
            first = Bottleneck(before, after, 1 if stage == 1 else 2)
            rest = [Bottleneck(after, after, 1) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
            before = after
            last.append(f"layer{stage}.{count - 1}")
        self.pool = GlobalPool()
        self.linear = nn.Linear(before, data.classes)
        self.taps = tap_paths("stem", [(f"{block}.pre", block.partition(".")[0]) for block in last])
        self.norms = norm_paths(f"{block}.bn3" for block in last)
        self.apply(he_convolutions)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        x = self.stem(F.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.linear(self.pool(self.layer4(self.layer3(self.layer2(self.layer1(x))))))
        return logits


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
BUILDERS: dict[str, Callable[[DataInfo], nn.Module]] = {
    **{f"cifar_resnet{6 * n + 2}": partial(ResNet, n, NARROW) for n in (1, 2, 3, 5, 7, 9, 18)},
    **{f"cifar_resnet{6 * n + 2}x4": partial(ResNet, n, WIDE) for n in (1, 5)},
    "cifar_resnet50": ResNet50,
}
