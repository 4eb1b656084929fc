"""Plan words as canonical JSON, and back: what keys are made of and what crosses to another process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from .errors import PlanError
from .plan import Json, ResultRef, Stage


def encode(value: Any, key_of: Callable[[Stage], str]) -> Json:
    """A plan word as JSON. Results of other stages become their keys; names for people are left out.

    So are fields at their default: a field that is added later changes no key. Changing a default does not either, so
    that wants a new ``kdcore.NUMERICS``.
    """
    if isinstance(value, ResultRef):
        return {"stage": value.stage if isinstance(value.stage, str) else key_of(value.stage), "member": value.member}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hidden = {"name"} if isinstance(value, Stage) else set()
        told = [f for f in dataclasses.fields(value) if f.name not in hidden and not _is_default(f, value)]
        return {f.name: encode(getattr(value, f.name), key_of) for f in told}
    if isinstance(value, Mapping):
        return {str(key): encode(item, key_of) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item, key_of) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise PlanError(f"{value!r} is not JSON", where="plan", fix="Options hold numbers, strings, lists and tables.")


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return default is not dataclasses.MISSING and getattr(value, field.name) == default


def decode(name: str, data: Json) -> Stage:
    """The stage that :func:`encode` wrote; its results of other stages are keys."""
    from pydantic import TypeAdapter

    return TypeAdapter(Stage).validate_python({"name": name, **data})


def canonical(data: Json) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: Json) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()
