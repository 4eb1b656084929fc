"""The CIFAR zoo of the distillation literature by name: ``build_NAME(options, data)``.

Layers, widths and parameter names are those of the field's reference zoo (RepDistiller, Tian et al., ICLR 2020), so
that its checkpoints fit; initial weights are drawn as there. Every family has the taps ``stem``, ``stage1`` to
``stageN`` (after the activation), ``stage1_pre`` to ``stageN_pre`` (before it) and ``pooled``. ``norms`` names, by tap,
the batch norm that comes last in a feature before its activation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import DataInfo, Options

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
        last = blocks - 1
        self.taps = {"stem": "stem"}
        for stage in (1, 2, 3):
            self.taps |= {f"stage{stage}_pre": f"layer{stage}.{last}.pre", f"stage{stage}": f"layer{stage}"}
        self.taps["pooled"] = "pool"
        self.norms = {f"stage{stage}_pre": f"layer{stage}.{last}.bn2" for stage in (1, 2, 3)}
        self.apply(init)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        x = self.stem(F.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(self.pool(self.layer3(self.layer2(self.layer1(x)))))
        return logits


def init(module: nn.Module) -> None:
    """He-normal convolutions, by fan-out; the rest as torch draws it."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(blocks: int, widths: tuple[int, int, int, int], options: Options, data: DataInfo) -> nn.Module:
    return ResNet(blocks, widths, data)


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
BUILDERS: dict[str, Callable[[Options, DataInfo], nn.Module]] = {
    **{f"cifar_resnet{6 * n + 2}": partial(resnet, n, NARROW) for n in (1, 2, 3, 5, 7, 9, 18)},
    **{f"cifar_resnet{6 * n + 2}x4": partial(resnet, n, WIDE) for n in (1, 5)},
}


def __getattr__(name: str) -> Any:
    model = name.removeprefix("build_")
    if model == name or model not in BUILDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return BUILDERS[model]
