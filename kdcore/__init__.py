"""kdcore: knowledge distillation as plugins on one runner.

Importing this package imports neither torch nor pydantic; names are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

NUMERICS = 1
"""Raised when a change to kdcore can change a trained weight; part of the key of every stage."""

_EXPORTS = {
    "errors": ("KdError RecipeError PluginError StorageError DataError NumericError DeviceError PlanError "
               "PreflightError Interrupted suggest"),
    "hookspecs": "hookimpl HOOKS_VERSION",
    "options": "Options Field",
    "registry": "Registrar",
    "plan": ("Stage Member Term Schedule Spec ModelRef ResultRef OptimizerSpec SourceSpec Set Drop Finish Decision "
             "Result MemberResult Outcome TickView Controller Strategy RunView labels_alone Plan Json"),
    "data": "Dataset Split DataInfo Batch Random Source SourceContext",
    "training": "Outputs StepContext Loss",
    "seeds": "derive",
}  # fmt: skip
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = ["NUMERICS", "__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdcore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
