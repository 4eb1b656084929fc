"""Options of the optimizers and schedules; free of torch, so that a recipe is checked without it."""

from __future__ import annotations

from ..options import Field, Options


class SGDOptions(Options):
    """torch.optim.SGD."""

    momentum: float = Field(0.9, ge=0, lt=1, description="a momentum from 0 to below 1")
    weight_decay: float = Field(0.0, ge=0, description="a weight decay from 0, e.g. 5e-4")
    nesterov: bool = Field(False, description="true for Nesterov's momentum")


class AdamWOptions(Options):
    """torch.optim.AdamW."""

    weight_decay: float = Field(0.01, ge=0, description="a weight decay from 0")
    betas: tuple[float, float] = Field((0.9, 0.999), description="two numbers below 1")
    eps: float = Field(1e-8, gt=0, description="a number above 0")


class LARSOptions(Options):
    """Layer-wise adaptive rate scaling."""

    momentum: float = Field(0.9, ge=0, lt=1, description="a momentum from 0 to below 1")
    weight_decay: float = Field(0.0, ge=0, description="a weight decay from 0, e.g. 1e-4")
    trust: float = Field(0.001, gt=0, description="the trust coefficient, above 0, e.g. 0.001")


class LAMBOptions(AdamWOptions):
    """Layer-wise adaptive moments."""

    eps: float = Field(1e-6, gt=0, description="a number above 0")


class ConstantOptions(Options):
    """No options."""


class CosineOptions(Options):
    """``floor`` is the factor at the end."""

    floor: float = Field(0.0, ge=0, le=1, description="the factor at the end, from 0 to 1")


class StepOptions(Options):
    """Multiplies by ``gamma`` at every milestone."""

    milestones: tuple[float, ...] = Field(description="a list of epochs, e.g. [150, 180, 210]")
    gamma: float = Field(0.1, gt=0, description="a factor above 0")
