"""Options of the losses, without torch, so that a recipe is checked quickly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BeforeValidator, model_validator

from kdcore import Field, Options

Variant: TypeAlias = Literal["public", "paper"]

Temperature = Annotated[float, Field(gt=0)]

TAPS = 'a list of taps such as ["stage?"] or ["stage2", "stage3"]'
STAGES = "stage*[0-9]"  # also stage10, which "stage?" is not; not stage1_pre
BEFORE_ACTIVATION = "stage*_pre"
STEM_AND_STAGES = "st*[m0-9]"  # a stem, where a model has one
WILD = set("*?[")  # a name with one of these is a pattern
VARIANT = '"public" (the form of published tables) or "paper"'


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Taps: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1, description=TAPS)]


class TapOptions(Options):
    """Which features are compared, from the deepest stage on, one by one; named ones must be as many on both sides."""

    student: Taps = (STAGES,)
    teacher: Taps = (STAGES,)

    @model_validator(mode="after")
    def _pair(self) -> Self:
        named = not any(WILD & set(tap) for tap in (*self.student, *self.teacher))
        if named and len(self.student) != len(self.teacher):
            student, teacher = (", ".join(taps) for taps in (self.student, self.teacher))
            raise ValueError(
                f"the student's taps are {student}, the teacher's are {teacher}: they are compared one by one. "
                "Name as many of both; a side that the recipe leaves out has its default."
            )
        return self


class CRDOptions(Options):
    student: str = Field("pooled", description="one tap")
    teacher: str = Field("pooled", description="one tap")
    negatives: int = Field(16384, ge=1, description="samples of other classes that a sample is compared with, from 1")
    temperature: float = Field(0.07, gt=0, description="a temperature above 0")
    momentum: float = Field(0.5, ge=0, lt=1, description="the share of a memory's old vector, from 0 to below 1")
    feat_dim: int = Field(128, ge=1, description="width of the embeddings, from 1")


class OFDOptions(TapOptions):
    student: Taps = (BEFORE_ACTIVATION,)
    teacher: Taps = (BEFORE_ACTIVATION,)


class ReviewKDOptions(TapOptions):
    student: Taps = (STAGES, "pooled")
    teacher: Taps = (BEFORE_ACTIVATION, "pooled")


class PooledOptions(TapOptions):
    """Which features are compared: the vectors before the heads, unless it says otherwise."""

    student: Taps = ("pooled",)
    teacher: Taps = ("pooled",)


class ATOptions(TapOptions):
    p: int = Field(2, ge=1, description="a power from 1")
    variant: Variant = Field("public", description=VARIANT)


class SPOptions(TapOptions):
    deepest: bool = Field(True, description="true to compare the deepest pair alone, as published tables do")


class PKTOptions(PooledOptions):
    variant: Variant = Field("public", description=VARIANT)


class RKDOptions(PooledOptions):
    distance_weight: float = Field(25.0, ge=0, description="a weight from 0")
    angle_weight: float = Field(50.0, ge=0, description="a weight from 0")
    squared: bool = Field(False, description="true to compare squared distances")


class CCOptions(PooledOptions):
    gamma: float = Field(0.4, gt=0, description="a number above 0, the fall of the Gaussian kernel")
    order: int = Field(2, ge=1, description="a number from 1, the terms of the kernel's series")


class IRGOptions(TapOptions):
    vertex: float = Field(0.1, ge=0, description="a weight from 0")
    edge: float = Field(5.0, ge=0, description="a weight from 0")
    transformation: float = Field(5.0, ge=0, description="a weight from 0")


class DistOptions(Options):
    """Pearson's correlation across classes and across the batch."""

    beta: float = Field(1.0, ge=0, description="a weight of the relation between classes, 0 or more")
    gamma: float = Field(1.0, ge=0, description="a weight of the relation between samples, 0 or more")
    temperature: float = Field(1.0, gt=0, description="a temperature above 0 (CIFAR: 4)")
    variant: Variant = Field(
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

    @property
    def needs_transforms(self) -> Mapping[str, str]:
        return {"views": "views"} if self.views == 2 else {}


class AdapterOptions(TapOptions):
    """The student's feature goes through an adapter that is trained with the student."""

    adapts: ClassVar = True
    adapter: str = Field("auto", description='an adapter: "auto", "conv1x1", "linear", "attention", or a plugin\'s')


class FitNetOptions(AdapterOptions):
    student: Taps = ("stage2",)
    teacher: Taps = ("stage2",)
    variant: Variant = Field("public", description=VARIANT)


class VIDOptions(AdapterOptions):
    init_variance: float = Field(5.0, gt=0, description="the variance at the start, above 0")
    eps: float = Field(1e-5, gt=0, description="the smallest variance, above 0")


class ABOptions(AdapterOptions):
    student: Taps = (BEFORE_ACTIVATION,)
    teacher: Taps = (BEFORE_ACTIVATION,)
    margin: float = Field(1.0, ge=0, description="the margin, at least 0")


class FTOptions(TapOptions):
    """Of the taps the deepest pair is compared."""

    variant: Variant = Field("public", description=VARIANT)
    rate: float = Field(0.5, gt=0, description="channels of a factor, as a share of the teacher's")
    reconstruction: float = Field(0.005, ge=0, description="the weight of the paraphraser's own loss, at least 0")


class FSPOptions(TapOptions):
    student: Taps = (STEM_AND_STAGES,)
    teacher: Taps = (STEM_AND_STAGES,)


class KDSVDOptions(TapOptions):
    vectors: int = Field(1, ge=1, description="how many singular vectors of the teacher count, at least 1")
    unfold: Literal["channels", "width"] = Field("channels", description='"channels" or "width"')
