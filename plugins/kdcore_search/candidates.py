"""Candidates for assistants: named, measured, checked and put in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import kdcore

UNITS = {"parameters": "parameters", "flops": "FLOPs an image"}


def named(run: kdcore.RunView, tables: Sequence[Mapping[str, Any]]) -> list[kdcore.ModelRef]:
    """The models of the tables; measures nothing.

    Raises:
        RecipeError: an unknown name, a bad option, a label map, or a model that stands there twice.
    """
    models = [run.model(table) for table in tables]
    for i, model in enumerate(models):
        if model.label_map is not None:
            fix = "It learns the data's classes; only the teacher can have others."
            raise kdcore.RecipeError("a candidate has no label map", where=f"strategy.candidates[{i}]", fix=fix)
        if model in models[:i]:
            what = f"{model} is candidates[{models.index(model)}] again"
            raise kdcore.RecipeError(what, where=f"strategy.candidates[{i}]", fix="Leave one of them out.")
    return models


def measured(
    run: kdcore.RunView,
    candidates: Sequence[kdcore.ModelRef],
    order: Literal["parameters", "flops"],
    allow_equal: bool,
) -> tuple[int, list[tuple[int, kdcore.ModelRef]]]:
    """The student's size, and the candidates with theirs from small to large; of equal ones the first named first.

    Raises:
        RecipeError: the teacher is not larger than the student, or a candidate not between them.
    """
    own, student, teacher = (_sizes(run, models, order) for models in (candidates, [run.student], [run.teacher]))
    low, high, unit = student[0], teacher[0], UNITS[order]
    if high < low or (high == low and not allow_equal):
        what = f"{run.teacher} has {high:,} {unit}, the student {run.student} has {low:,}"
        raise kdcore.RecipeError(what, where="teacher", fix="Write a larger teacher, or another strategy.order.")
    for i, (model, size) in enumerate(zip(candidates, own, strict=True)):
        if not (low < size < high or (allow_equal and low <= size <= high)):
            what = f"{model} has {size:,} {unit}, not between {run.student} ({low:,}) and {run.teacher} ({high:,})"
            instead = ", or allow_equal = true" if size in (low, high) else ""
            fix = f"Write a model whose size is between them{instead}."
            raise kdcore.RecipeError(what, where=f"strategy.candidates[{i}]", fix=fix)
    return low, sorted(zip(own, candidates, strict=True), key=lambda pair: pair[0])


def _sizes(run: kdcore.RunView, models: Iterable[kdcore.ModelRef], order: str) -> list[int]:
    costs = [run.measure(model) for model in models]
    return [cost.params if order == "parameters" else cost.flops for cost in costs]


def labels(models: Sequence[kdcore.ModelRef]) -> tuple[list[str], str]:
    """What to call each model in a chain's name, and what to put between: ``8`` and ``-`` if all are of one family and
    differ in size, else ``mlp-8`` and `` > ``.
    """
    sizes = [str(model.options.get("size", "")) for model in models]
    if all(sizes) and len({model.model for model in models}) == 1 and _tell_apart(models, sizes):
        return sizes, "-"
    return [_label(model, models) for model in models], " > "


def _tell_apart(models: Sequence[kdcore.ModelRef], names: Sequence[str]) -> bool:
    return all(models[names.index(name)] == model for name, model in zip(names, models, strict=True))


def _label(model: kdcore.ModelRef, models: Sequence[kdcore.ModelRef]) -> str:
    """The model's name, with the options in which it differs from others of that name."""
    own, alike = _about(model), [_about(other) for other in models if str(other) == str(model)]
    differing = [f"{key}={value}" for key, value in own.items() if any(other.get(key) != value for other in alike)]
    return " ".join([str(model), *differing])


def _about(model: kdcore.ModelRef) -> dict[str, Any]:
    return {"model": model.model, **model.options, "weights": model.weights}
