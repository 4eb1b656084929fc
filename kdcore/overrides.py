"""A recipe's text: TOML from a file, and single keys from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .options import shown
from .reading import read_plain

MOST_RECIPE = 1 << 24  # bytes


def read(path: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    try:
        return tomllib.loads(read_plain(path, MOST_RECIPE).decode("utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError("no such file", where=str(path), fix="Give the path of a .toml recipe.") from None
    except OSError as error:
        text = f"cannot be read: {error.strerror or error}"
        fix = "Give the path of a .toml recipe"
        raise RecipeError(text, where=str(path), fix=f"{fix}, or kdcore resume a run's folder.") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"not TOML: {error}", where=str(path), fix="Write a text file in UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        fix = 'Text stands in quotes, a table is { key = value }: student = { model = "mlp", size = 2 }.'
        raise RecipeError(f"not TOML: {error}", where=str(path), fix=fix) from None


def override(data: Mapping[str, Any], text: str) -> dict[str, Any]:
    """``data`` with one key set, e.g. by ``train.epochs=5``, ``objective.1.weight=3`` or ``objective[1].weight=3``."""
    path, equals, value = text.partition("=")
    keys = path.strip().replace("[", ".").replace("]", "").split(".")
    if not equals or not all(keys):
        raise RecipeError(f"{text!r} sets nothing", where="--set", fix="Write --set train.epochs=5.")
    return dict(_replaced(data, keys, _parsed(value), path))


def _parsed(value: str) -> Any:
    """The value as TOML; what is not, is text, so that no shell needs quotes within quotes."""
    try:
        found = tomllib.loads(f"value = {value}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return value.strip()
    return found["value"] if len(found) == 1 else value.strip()


def _replaced(data: Any, keys: list[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest, where = keys[0], keys[1:], f"--set {path}"
    number = int(key) if key.isascii() and key.isdigit() else None
    if isinstance(data, list | tuple):
        if number is None or number >= len(data):
            items = f"items 0 to {len(data) - 1}" if data else "no item"
            raise RecipeError(f"{key!r} is no item; the recipe has {items}", where=where, fix="Count from 0.")
        return [_replaced(item, rest, value, path) if i == number else item for i, item in enumerate(data)]
    if number is not None and not isinstance(data, Mapping):
        raise RecipeError(
            f"the recipe has no list with an item {key}", where=where, fix="Write the list into the recipe."
        )
    if not isinstance(data, Mapping | None):
        fix = f"Set the whole of it, e.g. {{ model = {data!r}, {key} = ... }}." if isinstance(data, str) else ""
        raise RecipeError(f"{shown(data)} is not a table, so it has no {key!r}", where=where, fix=fix)
    return {**(data or {}), key: _replaced((data or {}).get(key), rest, value, path)}
