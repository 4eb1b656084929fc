"""Options of the strategy ``variants``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from kdcore import Field, Options

OBJECTIVE = [{"loss": "cross_entropy"}, {"loss": "kd"}]


class VariantOptions(Options):
    """One objective by name.

    ``grid`` names options of terms and the values to try, e.g. ``{ "kd.weight" = [1, 4, 16] }``; of several keys, every
    combination is tried.
    """

    example: ClassVar[Mapping[str, Any]] = {"name": "kd", "objective": OBJECTIVE}

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="a name of a-z, 0-9, - and _")
    objective: tuple[dict[str, Any], ...] = Field(
        min_length=1, description='a list of tables like those of [[objective]], e.g. [{ loss = "kd" }]'
    )
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1, description="a list of values to try")]] = Field(
        {}, description='a table of values to try, e.g. { "kd.weight" = [1, 4, 16] }'
    )


class VariantsOptions(Options):
    example: ClassVar[Mapping[str, Any]] = {"variant": [VariantOptions.example]}

    variant: tuple[VariantOptions, ...] = Field(
        min_length=1, description="a list of tables, e.g. [[strategy.variant]] and below it name and objective"
    )
    seeds: int = Field(
        1, ge=1, description="a number of seeds of every student, from 1; the teacher has the run's seed"
    )
    grid_epochs: int | None = Field(None, ge=1, description="epochs of a point of the grid; nothing for train.epochs")
    together: int = Field(64, ge=1, description="how many students may be trained in one stage, from 1")
    diverged: Literal["stop", "drop"] = Field(
        "stop", description='what a point of the grid does that is no longer finite: "stop" the run, or "drop" out'
    )
