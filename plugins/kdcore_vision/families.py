"""Model families with a size: mlp-n, cnn-n and resnet-n.

Each is ``stages`` (feature taps ``stage1``, ``stage2``, ...), ``pool`` (``pooled``, one vector an image) and ``head``.
A stage without layers vanishes, from the last one on. Weights are drawn from torch's global generator alone.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import DataInfo

from .options import CnnOptions, MlpOptions, ResnetOptions

STAGES = 3


def groups(layers: int) -> list[int]:
    """Sizes of the stages that ``layers`` fill: stage s gets n // 3 + (s < n % 3)."""
    sizes = [layers // STAGES + (stage < layers % STAGES) for stage in range(STAGES)]
    return [size for size in sizes if size]


def channels(base: int, width: float, stages: int) -> list[int]:
    """Channels of each stage: ``base``, doubled from one to the next, times ``width``."""
    return [max(1, round(base * 2**stage * width)) for stage in range(stages)]


class Staged(nn.Module):
    """stem -> stages -> pool -> head.

    Args:
        stem: what comes before the first stage.
        stages: one module a stage.
        pool: turns the last stage's output into [B, D].
        head: [B, D] -> logits [B, classes].
    """

    def __init__(self, stem: nn.Module, stages: list[nn.Module], pool: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.stem, self.stages, self.pool, self.head = stem, nn.Sequential(*stages), pool, head
        self.taps = {f"stage{i + 1}": f"stages.{i}" for i in range(len(stages))} | {"pooled": "pool"}
        self.apply(init)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(images))))
        return logits


def init(module: nn.Module) -> None:
    """He-normal weights, zero bias: with torch's default a deep mlp stays at chance for epochs."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


class GlobalPool(nn.Module):
    """[B, C, H, W] -> [B, C]; a mean, whose gradient is deterministic on a GPU, unlike adaptive pooling's."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def mlp(options: MlpOptions, data: DataInfo) -> nn.Module:
    """mlp-n: n fully connected layers, the last one included; hidden ones have ``width`` units and a ReLU."""
    features = math.prod(data.shape)
    stages: list[nn.Module] = []
    for size in groups(options.size - 1):
        layers: list[nn.Module] = []
        for _ in range(size):
            layers += [nn.Linear(features, options.width), nn.ReLU()]
            features = options.width
        stages.append(nn.Sequential(*layers))
    return Staged(nn.Flatten(), stages, nn.Identity(), nn.Linear(features, data.classes))


def cnn(options: CnnOptions, data: DataInfo) -> nn.Module:
    """cnn-n: n 3x3 conv-BN-ReLU layers, 32, 64, 128 channels, max-pool between stages while the map is 4x4 or more."""
    before, height, width = data.shape
    sizes, side = groups(options.size), min(height, width)
    stages: list[nn.Module] = []
    for size, after in zip(sizes, channels(32, options.width, len(sizes)), strict=True):
        layers: list[nn.Module] = []
        if stages and side >= 4:
            layers, side = [nn.MaxPool2d(2)], side // 2
        for _ in range(size):
            layers += conv_bn_relu(before, after)
            before = after
        stages.append(nn.Sequential(*layers))
    return Staged(nn.Identity(), stages, GlobalPool(), nn.Linear(before, data.classes))


def resnet(options: ResnetOptions, data: DataInfo) -> nn.Module:
    """resnet-n: n basic blocks of 16, 32, 64 channels after a 3x3 stem; every stage but the first halves the map."""
    sizes = groups(options.size)
    widths = channels(16, options.width, len(sizes))
    stem = nn.Sequential(*conv_bn_relu(data.shape[0], widths[0]))
    stages: list[nn.Module] = []
    before = widths[0]
    for size, after in zip(sizes, widths, strict=True):
        first = BasicBlock(before, after, stride=2 if stages else 1)
        stages.append(nn.Sequential(first, *(BasicBlock(after, after) for _ in range(size - 1))))
        before = after
    return Staged(stem, stages, GlobalPool(), nn.Linear(before, data.classes))


def conv_bn_relu(before: int, after: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)  # batch norm brings the bias
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 2016); a 1x1 projection where the shape changes."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            projection = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H / stride, W / stride], rounded up."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))
