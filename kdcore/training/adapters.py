"""Adapters between features, for losses whose options name one."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..options import Options
from ..origin import blame
from ..registry import Catalog


def adapter_builder(
    options: Options, catalog: Catalog
) -> Callable[[tuple[int, ...], tuple[int, ...]], nn.Module] | None:
    """What builds the adapter that a loss's options name, with its own options at their defaults.

    Raises:
        RecipeError: no adapter has that name.
    """
    entry = catalog.adapter_of(options)
    if entry is None:
        return None

    def build(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
        with blame(entry.origin, f"building adapter {entry.full_name!r}"):
            module: nn.Module = entry.load()(student, teacher, entry.options_class()())
            entry.expect(module, nn.Module, "an nn.Module")
        return module

    return build
