"""Wide residual networks of the CIFAR zoo (Zagoruyko and Komodakis, 2016), whose blocks begin with norm and ReLU.

A stage ends in a sum without an activation: ``stageN`` is that sum, as it leaves the stage, and ``stageN_pre`` is what
the next batch norm makes of it, the value before the next ReLU. So ``norms`` names the first batch norm after a stage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import DataInfo

from .cifar_parts import he_without_biases, norm_paths, tap_paths
from .families import GlobalPool


class Block(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice; where the shape changes the shortcut begins after the first ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.convShortcut = None if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride]."""
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth - 4) / 6 blocks with 16, 32, 64 channels times ``width``."""

    def __init__(self, depth: int, width: int, data: DataInfo) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(data.shape[0], 16, 3, padding=1, bias=False)
        before = 16
        for stage in (1, 2, 3):
            after = 8 * 2**stage * width
            first = Block(before, after, 1 if stage == 1 else 2)
            layer = nn.Sequential(first, *(Block(after, after, 1) for _ in range((depth - 4) // 6 - 1)))
            setattr(self, f"block{stage}", nn.Sequential(OrderedDict(layer=layer)))
            before = after
        self.bn1 = nn.BatchNorm2d(before)
        self.pool = GlobalPool()
        self.fc = nn.Linear(before, data.classes)
        norms = ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
        self.taps = tap_paths("conv1", zip(norms, ["block1", "block2", "block3"], strict=True))
        self.norms = norm_paths(norms)
        self.apply(he_without_biases)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        logits: Tensor = self.fc(self.pool(F.relu(self.bn1(x))))
        return logits


BUILDERS: dict[str, Callable[[DataInfo], nn.Module]] = {
    f"cifar_wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth in (16, 40) for width in (1, 2)
}
