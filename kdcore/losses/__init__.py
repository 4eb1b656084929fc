"""Distillation losses: functions, modules and the terms that a recipe names.

Importing this package, and :mod:`kdcore.losses.options`, does not import torch: names are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ._ops import available_backends
    from .functional import dkd_loss, kd_loss
    from .modules import DKDLoss, KDLoss

__all__ = ["DKDLoss", "KDLoss", "available_backends", "dkd_loss", "kd_loss"]

Normalize = Literal["none", "class", "instance"]
"""What may be done to logits before the temperature."""

_HOME = {
    "DKDLoss": "modules",
    "KDLoss": "modules",
    "available_backends": "_ops",
    "dkd_loss": "functional",
    "kd_loss": "functional",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
