"""torchvision's classifiers: ``build_NAME(options, data)`` for every name in :data:`names.TORCHVISION`.

Parameter names stay torchvision's, so that a checkpoint of theirs fits. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn

from kdcore import DataError, DataInfo

from .names import TORCHVISION
from .options import TorchvisionOptions
from .taps import UNFIT, Rectifier, cannot_take, check_images, tap_head, tap_map


@dataclass(frozen=True)
class Family:
    """Where models whose names begin alike have their stages.

    Args:
        stages: paths of the stages, first one first.
        activation: the ReLU with which a stage's last block ends, by its path in that block; its input becomes the tap
            ``stageN_pre``.
        norms: paths in that block; the first one that exists is the batch norm that comes last before the activation.
        channels_last: a block gives [B, H, W, C].
    """

    stages: tuple[str, ...]
    activation: str = ""
    norms: tuple[str, ...] = ()
    channels_last: bool = False


FAMILIES: dict[tuple[str, ...], Family] = {
    ("resnet", "resnext", "wide_resnet"): Family(("layer1", "layer2", "layer3", "layer4"), "relu", ("bn3", "bn2")),
    ("regnet",): Family(tuple(f"trunk_output.block{i}" for i in range(1, 5)), "activation", ("f.c.1",)),
    ("densenet",): Family(tuple(f"features.denseblock{i}" for i in range(1, 5))),
    ("convnext",): Family(tuple(f"features.{i}" for i in (1, 3, 5, 7))),
    ("swin",): Family(tuple(f"features.{i}" for i in (1, 3, 5, 7)), channels_last=True),
    ("efficientnet",): Family(tuple(f"features.{i}" for i in range(1, 7))),
    ("mobilenet_v2",): Family(tuple(f"features.{i}" for i in (3, 6, 13, 17))),
    ("mobilenet_v3_large",): Family(tuple(f"features.{i}" for i in (3, 6, 12, 15))),
    ("mobilenet_v3_small",): Family(tuple(f"features.{i}" for i in (1, 3, 8, 11))),
    ("mnasnet",): Family(tuple(f"layers.{i}" for i in (8, 9, 11, 13))),
    ("shufflenet",): Family(("stage2", "stage3", "stage4")),
    ("maxvit",): Family(tuple(f"blocks.{i}" for i in range(4))),
}
"""Squeezenet is not here, and has no stages."""
PLAIN = ("alexnet", "vgg")
"""A row of layers, ``features``, in which a max-pool ends a stage."""


def __getattr__(name: str) -> Any:
    model = name.removeprefix("build_")
    if model == name or model not in TORCHVISION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(build, model)


def build(name: str, options: TorchvisionOptions, data: DataInfo) -> nn.Module:
    """Torchvision's ``name`` with a head for ``data.classes``, random weights, and ``taps``.

    Grey images get three equal channels. Dropout is off unless ``options.dropout``.

    Raises:
        DataError: the model cannot take images of this shape; says what torchvision says.
    """
    if data.shape[0] not in (1, 3):
        raise DataError(f"images have {data.shape[0]} channels", where=f"model {name!r}", fix="It takes 1 or 3.")
    try:
        model = construct(name, options, data)
    except UNFIT as error:
        raise cannot_take(data, name, error) from error
    check_images(model, data, name)
    return model


def construct(name: str, options: TorchvisionOptions, data: DataInfo) -> nn.Module:
    """The model as such, without a check of shapes."""
    sizes = _image_size(name, data)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=data.classes, **sizes)
    if not options.dropout:
        _disable_dropout(model)
    if data.shape[0] == 1:
        model.register_forward_pre_hook(_repeat_grey)
    tap_stages(model, name)
    model.taps |= _tap_last_linear(model)
    return model


def _image_size(name: str, data: DataInfo) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": max(data.shape[1:])}
    return {"input_size": data.shape[1:]} if name == "maxvit_t" else {}


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0


def _repeat_grey(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].expand(-1, 3, -1, -1),)  # a view: no copy


def _tap_last_linear(model: nn.Module) -> dict[str, str]:
    """Squeezenet ends in a convolution and has none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tap_head(model, names[-1]) if names else {}


def tap_stages(model: nn.Module, name: str) -> None:
    """Gives the model ``taps`` and ``norms`` of its stages."""
    model.taps, model.norms = {}, {}
    if name.startswith("vit_"):
        model.taps = _quarters(model)
    if name.startswith(PLAIN):
        _tap_plain(model)
    for families, family in FAMILIES.items():
        if name.startswith(families):
            for stage, path in enumerate(family.stages, start=1):
                _tap_stage(model, f"stage{stage}", path, family)


def _quarters(model: nn.Module) -> dict[str, str]:
    """Tokens [B, 1 + N, D], the class token first, after each quarter of the layers."""
    layers = len(model.encoder.layers)
    return {f"stage{i}": f"encoder.layers.encoder_layer_{layers * i // 4 - 1}" for i in (1, 2, 3, 4)}


def _tap_plain(model: nn.Module) -> None:
    """The value before and after the ReLU in front of each max-pool."""
    ends = [i - 1 for i, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)]
    for stage, end in enumerate(ends, start=1):
        model.features[end] = nn.ReLU()  # one in place would overwrite the value before it
        model.taps |= {f"stage{stage}_pre": f"features.{end - 1}", f"stage{stage}": f"features.{end}"}
        if isinstance(model.features[end - 1], nn.BatchNorm2d):
            model.norms[f"stage{stage}_pre"] = f"features.{end - 1}"


def _tap_stage(model: nn.Module, stage: str, path: str, family: Family) -> None:
    *_, (child, block) = model.get_submodule(path).named_children()
    if family.activation:
        block.set_submodule(family.activation, Rectifier())
        model.taps[f"{stage}_pre"] = f"{path}.{child}.{family.activation}.pre"
        inside = dict(block.named_modules())
        model.norms[f"{stage}_pre"] = f"{path}.{child}.{next(norm for norm in family.norms if norm in inside)}"
    model.taps[stage] = f"{path}.{child}.{tap_map(block)}" if family.channels_last else path
