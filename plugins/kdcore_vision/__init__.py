"""Vision models: families with a size (mlp, cnn, resnet), the CIFAR zoo, torchvision's and timm's classifiers."""

from __future__ import annotations

import kdcore

from .names import CIFAR, TORCHVISION

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    here = __name__
    for name, about in (
        ("mlp", "n fully connected layers of width 64"),
        ("cnn", "n 3x3 convolutions in three stages"),
        ("resnet", "n basic blocks in three stages, for small images"),
    ):
        options = f"{here}.options:{name.title()}Options"
        registry.model(name, f"{here}.families:{name}", options=options, about=about)
    for name in CIFAR:
        target, options = f"{here}.cifar:build_{name}", f"{here}.options:CifarOptions"
        registry.model(name, target, options=options, about="for 32x32 images")
    for name in TORCHVISION:
        target, options = f"{here}.torchvision_models:build_{name}", f"{here}.options:TorchvisionOptions"
        registry.model(name, target, options=options, about="torchvision's, without its weights")
    registry.model("timm", f"{here}.timm_models:build", options=f"{here}.options:TimmOptions",
                   about="any of timm's by its name, without its weights; needs the extra timm")  # fmt: skip
