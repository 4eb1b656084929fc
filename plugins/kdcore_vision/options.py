"""Options of the models, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kdcore import Field, Options

EXAMPLE = {"size": 3}


class MlpOptions(Options):
    example: ClassVar[Mapping[str, Any]] = EXAMPLE

    size: int = Field(ge=1, description="the number of fully connected layers, at least 1")
    width: int = Field(64, ge=1, description="the width of the hidden layers, such as 64")


class CnnOptions(Options):
    example: ClassVar[Mapping[str, Any]] = EXAMPLE

    size: int = Field(ge=1, description="the number of convolutions, at least 1")
    width: float = Field(1.0, gt=0, description="a factor of the channels 32, 64, 128, such as 1.0")


class ResnetOptions(Options):
    example: ClassVar[Mapping[str, Any]] = EXAMPLE

    size: int = Field(ge=1, description="the number of basic blocks, at least 1")
    width: float = Field(1.0, gt=0, description="a factor of the channels 16, 32, 64, such as 1.0")


class CifarOptions(Options):
    """None: its name says all of a model of the zoo."""


class TorchvisionOptions(Options):
    dropout: bool = Field(False, description="true to keep torchvision's dropout and stochastic depth")


class TimmOptions(Options):
    example: ClassVar[Mapping[str, Any]] = {"name": "test_resnet"}

    name: str = Field(min_length=1, description='a model of timm, such as "convnext_tiny"')
