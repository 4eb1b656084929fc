"""torchvision's classifiers: ``build_NAME(options, data)`` for every name in :data:`names.TORCHVISION`.

Parameter names stay torchvision's, so that a checkpoint of theirs fits. Nothing is downloaded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from kdcore import DataError, DataInfo

from .names import TORCHVISION
from .options import TorchvisionOptions

STAGES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("resnet", "resnext", "wide_resnet"): ("layer1", "layer2", "layer3", "layer4"),
    ("regnet",): tuple(f"trunk_output.block{i}" for i in range(1, 5)),
    ("densenet",): tuple(f"features.denseblock{i}" for i in range(1, 5)),
    ("convnext", "swin"): tuple(f"features.{i}" for i in (1, 3, 5, 7)),  # swin: [B, H, W, C]
    ("efficientnet",): tuple(f"features.{i}" for i in range(1, 7)),
    ("shufflenet",): ("stage2", "stage3", "stage4"),
    ("maxvit",): tuple(f"blocks.{i}" for i in range(4)),
}
"""Feature taps by family, first stage first; a family that is not here has no stages, only ``pooled``."""


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
        _check_forward(model, data)
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        shape = "x".join(str(n) for n in data.shape)
        fix = "Use larger images, or a model for small ones such as 'resnet'."
        raise DataError(f"it cannot take {shape} images: {error}", where=f"model {name!r}", fix=fix) from error
    return model


def _check_forward(model: nn.Module, data: DataInfo) -> None:
    # shapes only: no arithmetic, no random numbers, and batch norm's buffers are copies
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    model.eval()
    logits = torch.func.functional_call(model, shapes, torch.empty(2, *data.shape, device="meta"))
    assert logits.shape == (2, data.classes), f"logits have shape {tuple(logits.shape)}"
    model.train()


def construct(name: str, options: TorchvisionOptions, data: DataInfo) -> nn.Module:
    """The model as such, without a check of shapes."""
    sizes = _image_size(name, data)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=data.classes, **sizes)
    if not options.dropout:
        _disable_dropout(model)
    if data.shape[0] == 1:
        model.register_forward_pre_hook(_repeat_grey)
    model.taps = _stages(name) | _tap_head(model)  # type: ignore[assignment]
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


class Head(nn.Module):
    """A linear layer whose input [B, D] is a tap, ``pooled``; parameters are those of ``linear``, by the same names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.pooled = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(self.pooled(features), self.weight, self.bias)


def _tap_head(model: nn.Module) -> dict[str, str]:
    """Makes the input of the last linear layer a tap; squeezenet ends in a convolution and has none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        return {}
    parent, _, child = names[-1].rpartition(".")
    linear = model.get_submodule(names[-1])
    assert isinstance(linear, nn.Linear)
    setattr(model.get_submodule(parent), child, Head(linear))
    return {"pooled": f"{names[-1]}.pooled"}


def _stages(name: str) -> dict[str, str]:
    for families, paths in STAGES.items():
        if name.startswith(families):
            return {f"stage{i + 1}": path for i, path in enumerate(paths)}
    return {}
