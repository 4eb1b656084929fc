"""Options of the exporters, without torch."""

from __future__ import annotations

from ..options import Field, Options


class OnnxOptions(Options):
    """What the receiver of an ONNX file can read."""

    opset: int | None = Field(None, ge=18, description="the version of ONNX's operators, from 18; default: torch's")
