"""Training of one stage: its members on the same batches, each frozen one run once a batch."""

from __future__ import annotations

from ..outputs import Loss, Outputs, Shapes
from .step import StepContext

__all__ = ["Loss", "Outputs", "Shapes", "StepContext"]
