"""Label maps: which of a teacher's classes each of the data's classes stands for. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

from pydantic import model_validator

from .errors import RecipeError
from .options import Field, Options
from .origin import blame
from .plan import ModelRef, Spec
from .registry import Catalog

if TYPE_CHECKING:
    from .data import DataInfo

Groups: TypeAlias = tuple[tuple[int, ...], ...]


class MapOptions(Options):
    """What the listed maps share.

    Args:
        of: the number of the teacher's classes.
    """

    of: int = Field(ge=2, description="the number of the teacher's classes, such as 1000")

    @property
    def members(self) -> Groups:
        """For each of the data's classes, the teacher's that it stands for."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _fit(self) -> Self:
        check_groups(self.of, self.members)
        return self


class SubsetOptions(MapOptions):
    """The data's class i is the teacher's class ``classes[i]``."""

    classes: tuple[int, ...] = Field(min_length=2, description="a list of the teacher's classes, such as [3, 17]")
    example: ClassVar[Mapping[str, Any]] = {"of": 3, "classes": [2, 0]}

    @property
    def members(self) -> Groups:
        return tuple((index,) for index in self.classes)


class GroupsOptions(MapOptions):
    """The data's class i is any of the teacher's classes ``groups[i]``."""

    groups: Groups = Field(min_length=2, description="a list of lists of the teacher's classes, such as [[0, 1], [2]]")
    example: ClassVar[Mapping[str, Any]] = {"of": 4, "groups": [[0, 3], [1]]}

    @property
    def members(self) -> Groups:
        return self.groups


def listed(options: MapOptions, data: DataInfo) -> tuple[int, Groups]:
    """The map that the options list."""
    return options.of, options.members


def check_groups(of: int, groups: Sequence[Sequence[int]]) -> None:
    """Refuses groups that no probabilities can be summed over.

    Raises:
        ValueError: a group is empty, or a class of the teacher is out of range or in two groups.
    """
    owners: dict[int, int] = {}
    for number, group in enumerate(groups):
        if not group:
            raise ValueError(f"class {number} has none of the teacher's classes")
        for index in group:
            if not 0 <= index < of:
                raise ValueError(f"class {number} has the teacher's class {index}, which is not within 0 and {of - 1}")
            if index in owners:
                raise ValueError(f"the teacher's class {index} is named twice, by class {owners[index]} and {number}")
            owners[index] = number


def read_map(spec: Spec, catalog: Catalog, info: DataInfo) -> tuple[int, Groups]:
    """The number of the teacher's classes, and the groups of them.

    Raises:
        RecipeError: the map does not fit the data, or names a class twice or not at all.
        PluginError: the registered map gave something else.
    """
    entry = catalog.find("label_map", spec.name)
    with blame(entry.origin, f"building label map {entry.full_name!r}"):
        found = entry.load()(entry.options_class()(**spec.options), info)
        entry.expect(found, tuple, "the number of the teacher's classes, and a tuple of them for each of the data's")
        classes, groups = found
    where = f"label map {entry.full_name!r}"
    if len(groups) != info.classes:
        fix = "Give every class of the data its own."
        raise RecipeError(f"it is for {len(groups)} classes, the data have {info.classes}", where=where, fix=fix)
    try:
        check_groups(classes, groups)
    except ValueError as error:
        raise RecipeError(str(error), where=where) from None
    return classes, groups


def seen_by(model: ModelRef, catalog: Catalog, info: DataInfo) -> DataInfo:
    """The data as the model's own weights know them: with the classes that its label map says.

    Raises:
        RecipeError, PluginError: as :func:`read_map`.
    """
    return info if model.label_map is None else replace(info, classes=read_map(model.label_map, catalog, info)[0])


def offer(classes: int) -> str:
    """What to write where a teacher has another number of classes than the data."""
    return f'For a teacher of {classes} classes: label_map = {{ name = "subset", of = {classes}, classes = [...] }}.'
