"""Options of the losses, without torch, so that a recipe is checked quickly."""

from __future__ import annotations

from kdcore import Field, Options

TAPS = 'a list of taps such as ["stage?"] or ["stage2", "stage3"]'


class TapOptions(Options):
    """Which features are compared, from the deepest stage on, one by one."""

    student: tuple[str, ...] = Field(("stage?",), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field(("stage?",), min_length=1, description=TAPS)


class CRDOptions(Options):
    student: str = Field("pooled", description="one tap")
    teacher: str = Field("pooled", description="one tap")
    negatives: int = Field(16384, ge=1, description="samples of other classes that a sample is compared with, from 1")
    temperature: float = Field(0.07, gt=0, description="a temperature above 0")
    momentum: float = Field(0.5, ge=0, lt=1, description="the share of a memory's old vector, from 0 to below 1")
    feat_dim: int = Field(128, ge=1, description="width of the embeddings, from 1")


class OFDOptions(TapOptions):
    student: tuple[str, ...] = Field(("stage?_pre",), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field(("stage?_pre",), min_length=1, description=TAPS)


class ReviewKDOptions(TapOptions):
    student: tuple[str, ...] = Field(("stage?", "pooled"), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field(("stage?_pre", "pooled"), min_length=1, description=TAPS)
