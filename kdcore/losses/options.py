"""What a recipe may write for each loss; no torch here, so that recipes are checked without it."""

from __future__ import annotations

from typing import ClassVar

from ..options import Field, Options
from . import Normalize


class CrossEntropyOptions(Options):
    on_labels: ClassVar[bool] = True
    """A term of this loss has no source."""

    label_smoothing: float = Field(
        default=0.0, ge=0, le=1, allow_inf_nan=False, description="a label smoothing between 0 and 1"
    )


class KDOptions(Options):
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False, description="a temperature above 0")
    normalize: Normalize = Field(default="none", description='one of "none", "class" and "instance"')
    eps: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="an eps above 0 (or nothing: 1e-5 inside the root for class, 1e-7 beside it for instance)",
    )


class DKDOptions(KDOptions):
    alpha: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="a weight of the target part, 0 or more")
    beta: float = Field(default=8.0, ge=0, allow_inf_nan=False, description="a weight of the other classes, 0 or more")
