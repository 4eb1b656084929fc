"""Options of the losses, without torch, so that a recipe is checked quickly."""

from __future__ import annotations

from typing import Annotated, Literal

from kdcore import Field, Options

Temperature = Annotated[float, Field(gt=0)]

TAPS = 'a list of taps such as ["stage?"] or ["stage2", "stage3"]'


class TapOptions(Options):
    """Which features are compared, from the deepest stage on, one by one."""

    student: tuple[str, ...] = Field(("stage?",), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field(("stage?",), min_length=1, description=TAPS)


class DistOptions(Options):
    """Pearson's correlation across classes and across the batch."""

    beta: float = Field(1.0, ge=0, description="a weight of the relation between classes, 0 or more")
    gamma: float = Field(1.0, ge=0, description="a weight of the relation between samples, 0 or more")
    temperature: float = Field(1.0, gt=0, description="a temperature above 0 (CIFAR: 4)")
    variant: Literal["public", "paper"] = Field(
        "public", description='"public", or "paper", which does not multiply by the squared temperature'
    )


class NKDOptions(Options):
    """The target class and the others, apart."""

    temperature: float = Field(1.0, gt=0, description="a temperature above 0, of the classes that are not the target")
    gamma: float = Field(1.5, ge=0, description="a weight of the classes that are not the target, 0 or more")


class NormKDOptions(Options):
    """A temperature of each sample's own."""

    temperature: float = Field(2.0, gt=0, description="a temperature above 0, in deviations of a sample's logits")
    decoupled: bool = Field(False, description="true for DKD instead of KD")
    alpha: float = Field(1.0, ge=0, description="a weight of the target part of the decoupled form, 0 or more")
    beta: float = Field(8.0, ge=0, description="a weight of the other classes of the decoupled form, 0 or more")


class MLKDOptions(Options):
    """Several levels and temperatures."""

    temperature: float = Field(4.0, gt=0, description="a temperature above 0")
    beside: tuple[Temperature, ...] = Field((3.0, 5.0, 2.0, 6.0), description="a list of further temperatures above 0")
    normalize: Literal["none", "instance"] = Field("none", description='"none" or "instance"')
    views: Literal[1, 2] = Field(1, description='1, or 2 where the transform "views" doubles the batch')
