"""Data: sets, splits, and batches that are pure functions of a step.

Importing this package imports no torch; names are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .random import Random
    from .source import Source, SourceContext
    from .splits import load_splits
    from .types import Batch, DataInfo, Dataset, Images, Split, Splits, TrainData

_HOME = {
    "Batch": "types",
    "DataInfo": "types",
    "Dataset": "types",
    "Images": "types",
    "Random": "random",
    "Source": "source",
    "SourceContext": "source",
    "Split": "types",
    "Splits": "types",
    "TrainData": "types",
    "load_splits": "splits",
}

__all__ = [
    "Batch",
    "DataInfo",
    "Dataset",
    "Images",
    "Random",
    "Source",
    "SourceContext",
    "Split",
    "Splits",
    "TrainData",
    "load_splits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdcore.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
