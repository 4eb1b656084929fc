"""Options of the losses, without torch, so that a recipe is checked quickly."""

from __future__ import annotations

from typing import ClassVar, Literal

from kdcore import Field, Options

TAPS = 'a list of taps such as ["stage?"] or ["stage2", "stage3"]'


class TapOptions(Options):
    """Which features are compared, from the deepest stage on, one by one."""

    student: tuple[str, ...] = Field(("stage?",), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field(("stage?",), min_length=1, description=TAPS)


class AdapterOptions(TapOptions):
    """The student's feature goes through an adapter that is trained with the student."""

    adapts: ClassVar = True
    adapter: str = Field("auto", description='an adapter: "auto", "conv1x1", "linear", "attention", or a plugin\'s')


class FitNetOptions(AdapterOptions):
    student: tuple[str, ...] = Field(("stage2",), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field(("stage2",), min_length=1, description=TAPS)
    variant: Literal["public", "paper"] = Field("public", description='"public" or "paper"')


class VIDOptions(AdapterOptions):
    init_variance: float = Field(5.0, gt=0, description="the variance at the start, above 0")
    eps: float = Field(1e-5, gt=0, description="the smallest variance, above 0")


class ABOptions(AdapterOptions):
    student: tuple[str, ...] = Field(("stage?_pre",), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field(("stage?_pre",), min_length=1, description=TAPS)
    margin: float = Field(1.0, ge=0, description="the margin, at least 0")


class FTOptions(TapOptions):
    """Of the taps the deepest pair is compared."""

    variant: Literal["public", "paper"] = Field("public", description='"public" or "paper"')
    rate: float = Field(0.5, gt=0, description="channels of a factor, as a share of the teacher's")
    reconstruction: float = Field(0.005, ge=0, description="the weight of the paraphraser's own loss, at least 0")


STEM_AND_STAGES = "st?*[m1-9]"  # stage1 and so on, and stem where a model has one; not stage1_pre


class FSPOptions(TapOptions):
    student: tuple[str, ...] = Field((STEM_AND_STAGES,), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field((STEM_AND_STAGES,), min_length=1, description=TAPS)


class KDSVDOptions(TapOptions):
    vectors: int = Field(1, ge=1, description="how many singular vectors of the teacher count, at least 1")
    unfold: Literal["channels", "width"] = Field("channels", description='"channels" or "width"')
