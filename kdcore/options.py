"""Options: typed settings of everything that has a name in a recipe, checked with readable errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as Field

from .errors import RecipeError, suggest


class Options(BaseModel):
    """Base of every options class: frozen, and an unknown key is an error with a did-you-mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: Mapping[str, Any], where: str = "", also: Iterable[str] = ()) -> Model:
    """Checks ``data`` against ``model``.

    Args:
        model: the pydantic class.
        data: plain values, as TOML gives them.
        where: path of ``data`` in the recipe, put before the key in an error.
        also: keys beside the model's own that a misspelt one may have meant.

    Raises:
        RecipeError: names the first bad key's path, its value and what to write.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise _first(error, model, where, also) from None


def _first(error: ValidationError, model: type[BaseModel], where: str, also: Iterable[str]) -> RecipeError:
    # an unknown key explains a missing one, so it comes first
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    loc = [part for part in problem["loc"] if not _is_tag(part)]
    path = _path(where, loc)
    if problem["type"] == "extra_forbidden":
        owner = _owner(model, loc[:-1])
        return RecipeError("unknown key", where=path, fix=suggest(str(loc[-1]), [*_keys(owner), *also]))
    if problem["type"] == "missing":
        return RecipeError("missing", where=path, fix=_describe(model, loc) or "Give it a value.")
    message = problem["msg"].removeprefix("Value error, ")
    value = "" if problem["type"] == "value_error" and not loc else f"{problem['input']!r}: "
    return RecipeError(f"{value}{message}", where=path, fix=_describe(model, loc))


def _is_tag(part: str | int) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"str", "float", "int", "bool"})


def _path(where: str, loc: list[str | int]) -> str:
    text = where
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _owner(model: type[BaseModel], loc: list[str | int]) -> type[BaseModel]:
    """The class that holds the key at ``loc``, as far as annotations tell."""
    for part in loc:
        field = model.model_fields.get(str(part))
        inner = _inner_model(field.annotation) if field else None
        if inner is not None:
            model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _inner_model(part)
        if found is not None:
            return found
    return None


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _describe(model: type[BaseModel], loc: list[str | int]) -> str:
    names = [part for part in loc if isinstance(part, str)]
    if not names:
        return ""
    field = _owner(model, list(loc[:-1])).model_fields.get(names[-1])
    return f"Write {field.description}." if field and field.description else ""
