"""What a recipe may write of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from kdcore import Field, Options


class Budget(Options):
    """Limits over every distinct stage, the teacher's and the controls' too, whether it was trained now or reused."""

    stages: int | None = Field(None, ge=1, description="the most stages, from 1")
    seconds: float | None = Field(None, gt=0, description="the most seconds, summed over stages")
    tflops: float | None = Field(None, gt=0, description="the most TFLOPs (10^12 operations), summed over stages")


class SearchOptions(Options):
    """Candidates, the rule by which chains are kept, and what the search may cost."""

    example: ClassVar[Mapping[str, Any]] = {"candidates": [{"model": "mlp", "size": 2}]}

    candidates: list[dict[str, Any]] = Field(
        min_length=1, description='a list of models between teacher and student, e.g. [{ model = "cnn", size = 2 }]'
    )
    mode: Literal["greedy", "exhaustive", "beam"] = Field("greedy", description='"greedy", "exhaustive" or "beam"')
    width: int = Field(2, ge=1, description="the number of chains that a beam keeps, from 1")
    assistants: int | None = Field(None, ge=1, description="the most assistants of a chain, from 1")
    order: Literal["parameters", "flops"] = Field("parameters", description='"parameters" or "flops"')
    allow_equal: bool = Field(False, description="true if neighbours in a chain may be of one size")
    seeds: int = Field(1, ge=1, description="the number of seeds of every chain, from 1")
    baseline: bool = Field(False, description="true if every chain is also trained without controllers")
    prune: float | None = Field(None, ge=0, description="a number of standard errors, e.g. 3.0")
    budget: Budget = Field(Budget(), description="a table, e.g. { stages = 20, tflops = 50.0 }")

    @property
    def longest(self) -> int:
        """The most assistants of a chain: without a limit, as many as there are candidates."""
        return self.assistants or len(self.candidates)

    @property
    def kept(self) -> int:
        """The most chains that are kept of a round, unless all are."""
        return self.width if self.mode == "beam" else 1
