"""Faults of recipes, as tests look at them."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from conftest import TINY

from kdcore.errors import RecipeError
from kdcore.plugins import PluginHost
from kdcore.recipe import compile_recipe, load

BASE = tomllib.loads(TINY)


def check(data: dict[str, Any], host: PluginHost, *sets: str) -> Any:
    """The whole check of a recipe, as every command does it."""
    recipe = load(data, sets)
    return compile_recipe(recipe, host.catalog)


def fault(host: PluginHost, change: dict[str, Any], *sets: str) -> str:
    with pytest.raises(RecipeError) as error:
        check({**BASE, **change}, host, *sets)
    return str(error.value)
