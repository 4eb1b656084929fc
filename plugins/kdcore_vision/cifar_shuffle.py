"""ShuffleNets of the CIFAR zoo (Zhang et al., 2018; Ma et al., 2018): a 1x1 stem and three stages that halve the map.

Initial weights are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import DataInfo

from .cifar_parts import norm_paths, tap_paths
from .families import GlobalPool


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels [B, groups * n, H, W] in the order of their place in a group."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class GroupBlock(nn.Module):
    """ShuffleNetV1's: 1x1 in groups, shuffle, 3x3 depthwise, 1x1 in groups; stride 2 concatenates the pooled input."""

    def __init__(self, before: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        added = after - before if stride == 2 else after
        inner = added // 4
        self.groups = 1 if before == STEM else groups
        self.conv1 = nn.Conv2d(before, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = depthwise(inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, added, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(added)
        self.shortcut = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else None
        self.pre = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        out = shuffled(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(self.pre(out + x if self.shortcut is None else torch.cat([out, self.shortcut(x)], 1)))


class SplitBlock(nn.Module):
    """ShuffleNetV2's: half of the channels pass unchanged, then both halves are shuffled.

    ``pre`` is both halves before ReLU and shuffle; the half that passes is not negative already.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.pre = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same."""
        passed, changed = x.chunk(2, 1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(changed)))))
        out = self.bn3(self.conv3(out))
        return shuffled(F.relu(self.pre(torch.cat([passed, out], 1))), 2)


class DownBlock(nn.Module):
    """ShuffleNetV2's first block of a stage: two branches of stride 2, concatenated and shuffled."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        half = after // 2
        self.conv1 = depthwise(before, 2)
        self.bn1 = nn.BatchNorm2d(before)
        self.conv2 = nn.Conv2d(before, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(before, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / 2, W / 2]."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return shuffled(F.relu(torch.cat([left, self.bn5(self.conv5(right))], 1)), 2)


STEM, GROUPS, LAST = 24, 3, 1024
V1 = ((240, 4), (480, 8), (960, 4))  # channels and blocks of each stage
V2 = ((116, 4), (232, 8), (464, 4))


class ShuffleNet(nn.Module):
    """ShuffleNetV1 with three groups."""

    def __init__(self, data: DataInfo) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(data.shape[0], STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.stem = nn.Identity()
        before = STEM
        for stage, (after, count) in enumerate(V1, start=1):
            first = GroupBlock(before, after, 2, GROUPS)
            rest = [GroupBlock(after, after, 1, GROUPS) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
            before = after
        self.pool = GlobalPool()
        self.linear = nn.Linear(before, data.classes)
        self.taps = _taps(V1)
        self.norms = norm_paths(f"layer{stage}.{count - 1}.bn3" for stage, (_, count) in enumerate(V1, start=1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        x = self.stem(F.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.linear(self.pool(self.layer3(self.layer2(self.layer1(x)))))
        return logits


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of width 1; no ``norms``, since the halves of a stage's end have batch norms of different blocks."""

    def __init__(self, data: DataInfo) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(data.shape[0], STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.stem = nn.Identity()
        before = STEM
        for stage, (after, count) in enumerate(V2, start=1):
            rest = [SplitBlock(after) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(DownBlock(before, after), *rest))
            before = after
        self.conv2 = nn.Conv2d(before, LAST, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST)
        self.pool = GlobalPool()
        self.linear = nn.Linear(LAST, data.classes)
        self.taps = _taps(V2)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        x = self.stem(F.relu(self.bn1(self.conv1(images))))
        x = F.relu(self.bn2(self.conv2(self.layer3(self.layer2(self.layer1(x))))))
        logits: Tensor = self.linear(self.pool(x))
        return logits


def _taps(stages: tuple[tuple[int, int], ...]) -> dict[str, str]:
    return tap_paths("stem", [(f"layer{i}.{count - 1}.pre", f"layer{i}") for i, (_, count) in enumerate(stages, 1)])


BUILDERS: dict[str, Callable[[DataInfo], nn.Module]] = {
    "cifar_shufflenetv1": ShuffleNet,
    "cifar_shufflenetv2": ShuffleNetV2,
}
