"""Options: typed settings of everything that has a name in a recipe, checked with readable errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic import Field as Field

from .errors import RecipeError, suggest

LONGEST_VALUE = 60
SCALARS = ("bool", "int", "float", "str")


def _make_scalars_strict(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") in SCALARS:
            schema.setdefault("strict", True)
        for key, part in schema.items():
            if key != "metadata":
                _make_scalars_strict(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _make_scalars_strict(part)


class Plain(BaseModel):
    """Base of everything a recipe holds: frozen, finite, and a number is neither ``true`` nor ``"5"``."""

    # defaults too: the int 0 as a float's default has another JSON, and so another key, than the 0.0 it is read back as
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        # pydantic's strict mode would refuse lists for tuples too, which is all that TOML has
        schema = handler(source)
        _make_scalars_strict(schema)
        return schema


class Options(Plain):
    """Base of every options class: frozen, and an unknown key is an error with a did-you-mean.

    A class with required fields gives an ``example`` of them, which :mod:`kdcore.testing` checks its owner with.
    """

    model_config = ConfigDict(extra="forbid")
    example: ClassVar[Mapping[str, Any]] = {}


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


def shown(value: Any) -> str:
    """A value as a recipe writes it, cut to a readable length."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _first(error: ValidationError, model: type[BaseModel], where: str, also: Iterable[str]) -> RecipeError:
    # an unknown key explains a missing one, so it comes first
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    loc = _clean(problem["loc"], model)
    if problem["type"] == "extra_forbidden":
        loc = [*_clean(problem["loc"][:-1], model), problem["loc"][-1]]
        return RecipeError("unknown key", where=_path(where, loc), fix=_meant(model, loc, also))
    path = _path(where, loc)
    if problem["type"] == "missing":
        return RecipeError("missing", where=path, fix=_describe(model, loc) or "Give it a value.")
    what = _what(problem["type"], problem.get("ctx", {}), problem["msg"])
    fitting = what if not loc and problem["type"] == "value_error" else f"{shown(problem['input'])} {what}"
    return RecipeError(fitting, where=path, fix=_describe(model, loc))


# pydantic's error type -> what a person reads after the value
_TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than": lambda c: f"is not above {_bound(c['gt'])}",
    "greater_than_equal": lambda c: f"is below {_bound(c['ge'])}",
    "less_than": lambda c: f"is not below {_bound(c['lt'])}",
    "less_than_equal": lambda c: f"is above {_bound(c['le'])}",
    "finite_number": lambda c: "is not finite",
    "literal_error": lambda c: f"is not {c['expected']}",
    "enum": lambda c: f"is not {c['expected']}",
    "string_pattern_mismatch": lambda c: "does not fit",
    "string_too_short": lambda c: "is too short",
    "too_short": lambda c: f"has {c['actual_length']} items, fewer than {c['min_length']}",
    "too_long": lambda c: f"has more than {c['max_length']} items",
}
_TYPES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list",
    "list": "a list", "set": "a list", "dict": "a table", "model": "a table",
}  # fmt: skip


def _bound(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _what(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind in _TEXTS:
        return _TEXTS[kind](context)
    family, _, rest = kind.partition("_")
    if family in _TYPES and rest in {"type", "parsing", "from_float", "attributes_type"}:
        return f"is not {_TYPES[family]}"
    return f"does not fit: {message.removeprefix('Value error, ')}"


def _clean(loc: tuple[str | int, ...], model: type[BaseModel]) -> list[str | int]:
    """The path of a key: pydantic puts the tried type after a key whose type is a union."""
    path: list[str | int] = []
    for part in loc:
        known = part in _owner(model, path).model_fields
        if isinstance(part, int) or known or not ("[" in part or "-" in part or part in SCALARS):
            path.append(part)
    return path


def _path(where: str, loc: list[str | int]) -> str:
    text = where
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _meant(model: type[BaseModel], loc: list[str | int], also: Iterable[str]) -> str:
    """What may have been meant by an unknown key: a similar one here, or the same one in another table."""
    key, known = str(loc[-1]), [*_keys(_owner(model, loc[:-1])), *also]
    text = suggest(key, known) if known else "It takes no options."
    places = [] if text.startswith("Did") else list(_places(model, key))
    return f"Write it as {' or '.join(places)}." if places else text


def _places(model: type[BaseModel], key: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if name == key:
            yield name
        elif inner is not None and key in inner.model_fields and key != "name":
            yield f"{name}.{key}"


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
    """What to write at ``loc``: the description of its key, or of the list that it is an item of."""
    last = max((i for i, part in enumerate(loc) if isinstance(part, str)), default=None)
    if last is None:
        return ""
    field = _owner(model, loc[:last]).model_fields.get(str(loc[last]))
    return f"Write {field.description}." if field and field.description else ""
