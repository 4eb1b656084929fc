"""How a transform is built: what it is told, and those that its options hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .origin import blame
from .plan import Spec
from .registry import Catalog

if TYPE_CHECKING:
    from .data.source import Transform
    from .data.types import DataInfo


@dataclass(frozen=True)
class TransformContext:
    """What a transform with a class method ``build(options, context)`` is built with.

    Args:
        info: the shape of an image and the number of classes.
        inner: the transforms that its options hold, by option.
    """

    info: DataInfo
    inner: Mapping[str, tuple[Transform, ...]]


def build_transform(spec: Spec, catalog: Catalog, info: DataInfo) -> Any:
    """A registered transform, by its ``build`` if it has one, else constructed with its options alone."""
    entry = catalog.find("transform", spec.name)
    inner = {
        key: tuple(build_transform(part, catalog, info) for part in parts) for key, parts in held(spec, catalog).items()
    }
    with blame(entry.origin, f"building transform {entry.full_name!r}"):
        kind, options = entry.load(), entry.options_class()(**spec.options)
        return kind.build(options, TransformContext(info, inner)) if hasattr(kind, "build") else kind(options)


def holders(name: str, catalog: Catalog) -> tuple[str, ...]:
    """The options of a transform that hold transforms: its options class names them in ``transforms``."""
    return tuple(getattr(catalog.find("transform", name).options_class(), "transforms", ()))


def held(spec: Spec, catalog: Catalog) -> dict[str, tuple[Spec, ...]]:
    """The transforms that the options of one hold, by option."""
    return {key: tuple(map(_spec, spec.options.get(key, ()))) for key in holders(spec.name, catalog)}


def every(specs: Iterable[Spec], catalog: Catalog) -> Iterator[Spec]:
    """Transforms and all that they hold."""
    for spec in specs:
        yield spec
        for parts in held(spec, catalog).values():
            yield from every(parts, catalog)


def _spec(table: Mapping[str, Any]) -> Spec:
    """Of a table as a recipe has it: its name, and its options beside that."""
    return Spec(table["name"], {key: value for key, value in table.items() if key != "name"})
