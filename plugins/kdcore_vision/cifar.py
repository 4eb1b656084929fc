"""The CIFAR zoo of the distillation literature by name: ``build_NAME(options, data)``.

Layers, widths and parameter names are those of the field's reference zoo (RepDistiller, Tian et al., ICLR 2020), so
that its checkpoints fit; initial weights are drawn as there. Every family has the taps ``stem``, ``stage1`` to
``stageN`` (after the activation), ``stage1_pre`` to ``stageN_pre`` (before it) and ``pooled``. ``norms`` names, by tap,
the batch norm that comes last in a feature before its activation. What a family does otherwise is said in its file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from kdcore import DataInfo

from . import cifar_mobile, cifar_resnet, cifar_shuffle, cifar_vgg, cifar_wrn
from .options import CifarOptions

BUILDERS = (
    cifar_resnet.BUILDERS | cifar_wrn.BUILDERS | cifar_vgg.BUILDERS | cifar_mobile.BUILDERS | cifar_shuffle.BUILDERS
)


def build(name: str, options: CifarOptions, data: DataInfo) -> nn.Module:
    """The model ``name`` for images of any number of channels."""
    return BUILDERS[name](data)


def __getattr__(name: str) -> Any:
    model = name.removeprefix("build_")
    if model == name or model not in BUILDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(build, model)
