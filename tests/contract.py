"""What plugins rely on, as text: the hooks, what plugins call, what they implement, and the names they import.

make hooks        records it in hooks.json; refused if a plugin can notice a change and HOOKS_VERSION was not raised
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import kdcore
import kdcore.data
import kdcore.losses
from kdcore import hookspecs, registry

RECORD = Path(__file__).parent / "hooks.json"
ANYWHERE = "positional_or_keyword"
MADE_BY_KDCORE = (
    "Depot",
    "Registrar",
    "StepContext",
)  # plugins are given them, so how they are made is nobody's concern
OPERATORS = ("__getitem__", "__len__")

Signature: TypeAlias = list[dict[str, str]]
"""One row an argument: name, annotation, kind unless it is ANYWHERE, and default if there is one; then the return."""

Contract: TypeAlias = dict[str, Any]
"""``HOOKS_VERSION``; ``hooks``, ``called`` and ``implemented`` by name; lists of words of which none may go."""


# ---------------------------------------------------------------- taking it down


def contract() -> Contract:
    """The contract as the sources state it now."""
    public = dict(_public())
    protocols = {name: value for name, value in public.items() if _is_implemented(name, value)}
    called = {name: value for name, value in public.items() if name not in protocols and _is_ours(value)}
    hooks = {name: value for name, value in vars(hookspecs).items() if name.startswith("kdcore_")}
    return {
        "HOOKS_VERSION": hookspecs.HOOKS_VERSION,
        "hooks": {name: _signature(value) for name, value in hooks.items()},
        "called": dict(row for name, value in called.items() for row in _callables(name, value)),
        "implemented": dict(row for name, value in protocols.items() for row in _members(name, value)),
        "required": [f"{kind}.{name}" for kind, names in registry.REQUIRED.items() for name in names],
        "names": sorted(public),
        "decisions": sorted(part.__name__ for part in kdcore.Decision.__args__),
        "targets": [f"{kind}: {call}" for kind in registry.KINDS for call in _stated(kind)],
    }


def _public() -> Iterator[tuple[str, Any]]:
    """What plugins may import: from kdcore by its name, from the packages beside it by their path."""
    yield from ((name, getattr(kdcore, name)) for name in kdcore.__all__)
    for package in (kdcore.data, kdcore.losses):
        rest = [name for name in package.__all__ if name not in kdcore.__all__]
        yield from ((f"{package.__name__.removeprefix('kdcore.')}.{name}", getattr(package, name)) for name in rest)


def _is_implemented(name: str, value: Any) -> bool:
    return getattr(value, "_is_protocol", False) and name not in MADE_BY_KDCORE


def _is_ours(value: Any) -> bool:
    return callable(value) and str(getattr(value, "__module__", "")).startswith("kdcore")


def _callables(name: str, value: Any) -> Iterator[tuple[str, Signature]]:
    """How a function or a class is called, and what is public of the class."""
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    if name not in MADE_BY_KDCORE:
        yield name, _fields(value) if fields else _signature(value)
    if not inspect.isclass(value):
        return
    for attribute, annotation in ({} if fields else inspect.get_annotations(value)).items():
        if not attribute.startswith("_"):
            yield f"{name}.{attribute}", [_row("return", annotation)]
    for attribute, member in inspect.getmembers(value):
        if isinstance(member, property) and _is_ours(member.fget):
            yield f"{name}.{attribute}", [_row("return", member.fget.__annotations__["return"])]
        elif (not attribute.startswith("_") or attribute in OPERATORS) and attribute not in fields and _is_ours(member):
            yield f"{name}.{attribute}", _signature(member)


def _members(name: str, protocol: type) -> Iterator[tuple[str, Signature]]:
    """What an implementation has."""
    for attribute, annotation in inspect.get_annotations(protocol).items():
        yield f"{name}.{attribute}", [_row("return", annotation)]
    for method, function in vars(protocol).items():
        if not method.startswith("_") and callable(getattr(protocol, method)):
            yield f"{name}.{method}", _signature(getattr(function, "__func__", function))


def _signature(function: Callable[..., Any]) -> Signature:
    signature = inspect.signature(function)
    arguments = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    rows = [_row(p.name, p.annotation, p.kind.name.lower(), p.default) for p in arguments]
    return rows if inspect.isclass(function) else [*rows, _row("return", signature.return_annotation)]


def _fields(cls: Any) -> Signature:
    """A dataclass by its fields: in a signature a default factory has no text of its own."""
    return [_row(field.name, field.type, default=_default(field)) for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _row(name: str, annotation: Any, kind: str = ANYWHERE, default: Any = inspect.Parameter.empty) -> dict[str, str]:
    row = {"name": name, "annotation": annotation if isinstance(annotation, str) else repr(annotation)}
    if kind != ANYWHERE:
        row["kind"] = kind
    if default is not inspect.Parameter.empty:
        row["default"] = "a function" if inspect.isfunction(default) else repr(default)
    return row


def _stated(kind: str) -> list[str]:
    """The calls that the registrar's docstring promises to what is registered, e.g. ``build(options)``."""
    return re.findall(r"``([^`]*\(.*?)``", inspect.getdoc(getattr(registry.Registrar, kind)) or "", re.S)


# ---------------------------------------------------------------- comparing


def verdict(old: Contract, new: Contract) -> str:
    """What is wrong with a change from ``old`` to ``new``, and what to do; empty if nothing."""
    before, now = old["HOOKS_VERSION"], new["HOOKS_VERSION"]
    if now < before:
        return f"HOOKS_VERSION fell from {before} to {now}: a plugin may state the higher one already"
    changes = noticed(old, new)
    if changes and now == before:
        listed = "".join(f"\n  {change}" for change in changes)
        fix = "Undo it. Or raise HOOKS_VERSION in kdcore/hookspecs.py, say in docs/plugins.md what authors have to do, "
        return f"existing plugins can notice:{listed}\n{fix}and `make hooks`."
    return ""


def noticed(old: Contract, new: Contract) -> list[str]:
    """The changes that a plugin written for ``old`` can notice under ``new``, in words."""
    found = [f"{word} is gone" for part in ("names", "decisions", "targets") for word in _only_in(old[part], new[part])]
    for part in ("implemented", "required"):  # of what had a contract before
        had = {name.partition(".")[0] for name in old[part]}
        new_duties = [name for name in _only_in(new[part], old[part]) if name.partition(".")[0] in had]
        found += [f"{name} has to be implemented now" for name in new_duties]
    for part, changed in (("hooks", _changed), ("called", _changed_call), ("implemented", _changed_implementation)):
        found += [f"{name} is gone" for name in _only_in(old[part], new[part])]
        both = [name for name in old[part] if name in new[part]]
        found += [f"{name}: {change}" for name in both for change in changed(old[part][name], new[part][name])]
    return list(dict.fromkeys(found))


def _only_in(one: Iterable[str], other: Collection[str]) -> list[str]:
    return [word for word in one if word not in other]


def _changed(old: Signature, new: Signature) -> list[str]:
    """All that a hook's implementation notices: it gets the arguments that it names, in its own order."""
    now = {row["name"]: row for row in new}
    gone = [f"argument {row['name']!r} is gone" for row in old if row["name"] not in now]
    pairs = [(row, now[row["name"]]) for row in old if row["name"] in now]
    return [*gone, *(change for row, other in pairs for change in _differences(row, other))]


def _differences(row: Mapping[str, str], other: Mapping[str, str]) -> Iterator[str]:
    name = row["name"]
    if row["annotation"] != other["annotation"]:
        yield f"{name!r} was {row['annotation']}, now it is {other['annotation']}"
    if other.get("kind", ANYWHERE) not in (ANYWHERE, row.get("kind", ANYWHERE)):
        yield f"{name!r} is {other['kind']} now"
    if "default" in row and row["default"] != other.get("default"):
        yield f"{name!r} was {row['default']} by default, now it {_said(other)}"


def _said(row: Mapping[str, str]) -> str:
    return f"is {row['default']}" if "default" in row else "has to be given"


def _changed_call(old: Signature, new: Signature) -> list[str]:
    """A plugin calls it, by position or by name: what is new has a default, and comes last or by name alone."""
    given = [row["name"] for row in new if "default" in row or row.get("kind", "").startswith("var_")]
    needed = _only_in(_names(new), [*_names(old), *given])
    found = [*_changed(old, _as_called(old, new)), *(f"new argument {name!r} has no default" for name in needed)]
    before, now = _names(old, by_position=True), _names(new, by_position=True)
    return found if found or now[: len(before)] == before else [_moved(before, now)]


def _as_called(old: Signature, new: Signature) -> Signature:
    """A function's argument that takes more than before is what it was, to those who call; fields are read, too."""
    was = {row["name"]: row["annotation"] for row in old}
    if was.pop("return", None) is None:  # a class has none
        return new
    known = [row for row in new if row["name"] in was]
    wider = {row["name"] for row in known if row["annotation"].startswith(f"{was[row['name']]} | ")}
    return [{**row, "annotation": was[row["name"]]} if row["name"] in wider else row for row in new]


def _changed_implementation(old: Signature, new: Signature) -> list[str]:
    """kdcore calls it, so an existing implementation takes neither another order nor a further argument."""
    found, before, now = _changed(old, new), _names(old), _names(new)
    return found if found or now == before else [_moved(before, now)]


def _moved(before: list[str], now: list[str]) -> str:
    return f"its arguments were ({', '.join(before)}), now they are ({', '.join(now)})"


def _names(signature: Signature, *, by_position: bool = False) -> list[str]:
    return [row["name"] for row in signature if row["name"] != "return" and not (by_position and "kind" in row)]


# ---------------------------------------------------------------- the record


def recorded(path: Path = RECORD) -> Contract:
    """The contract as `make hooks` wrote it."""
    return dict(json.loads(path.read_text()))


def lines(value: Contract) -> str:
    """JSON with one line a signature."""
    parts = []
    for name, part in value.items():
        if isinstance(part, dict):
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(part[key])}" for key in sorted(part))
            parts.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(part)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def record(path: Path) -> None:
    """Writes the contract of now to ``path``, unless a plugin can notice what changed since the last time."""
    if path.exists() and (problem := verdict(recorded(path), contract())):
        sys.exit(problem)
    path.write_text(lines(contract()))


if __name__ == "__main__":
    record(RECORD)
