"""MobileNetV2 of the CIFAR zoo: expansion 6, half the width (Sandler et al., 2018).

Its blocks end in a batch norm without an activation, so ``stageN_pre`` and ``stageN`` are the same value, and ``norms``
names that batch norm.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from kdcore import DataInfo

from .cifar_parts import he_with_a_small_head, norm_paths, tap_paths
from .families import GlobalPool

GROUPS = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
"""Expansion, channels, blocks and stride of each group of blocks."""
STAGE_ENDS = (1, 2, 4, 6)
"""The groups after which a stage ends."""


class InvertedResidual(nn.Module):
    """A 1x1, a 3x3 depthwise and a linear 1x1 convolution; the sum with its input where the shape stays."""

    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.conv = nn.Sequential(
            *conv_bn_relu(before, inner, 1),
            *conv_bn_relu(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """A stem of stride 2, seven groups of blocks, a 1x1 convolution to 1280 channels: 32x32 images end in 2x2."""

    def __init__(self, data: DataInfo) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn_relu(data.shape[0], 16, 3, stride=2))
        self.blocks = nn.Sequential()
        before = 16
        for expansion, after, count, stride in GROUPS:
            first = InvertedResidual(before, after, stride, expansion)
            rest = [InvertedResidual(after, after, 1, expansion) for _ in range(count - 1)]
            self.blocks.append(nn.Sequential(first, *rest))
            before = after
        self.conv2 = nn.Sequential(*conv_bn_relu(before, 1280, 1))
        self.pool = GlobalPool()
        self.classifier = nn.Sequential(nn.Linear(1280, data.classes))
        self.taps = tap_paths("conv1", [(f"blocks.{end}", f"blocks.{end}") for end in STAGE_ENDS])
        self.norms = norm_paths(f"blocks.{end}.{GROUPS[end][2] - 1}.conv.7" for end in STAGE_ENDS)
        self.apply(he_with_a_small_head)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        logits: Tensor = self.classifier(self.pool(self.conv2(self.blocks(self.conv1(images)))))
        return logits


def conv_bn_relu(before: int, after: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


BUILDERS: dict[str, Callable[[DataInfo], nn.Module]] = {"cifar_mobilenetv2": MobileNetV2}
