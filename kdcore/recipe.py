"""Recipes: TOML, checked whole before torch is imported, and turned into the words of a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .card import find_card, find_model
from .errors import RecipeError, StorageError
from .options import Field, Options, shown, validate
from .origin import OWN
from .overrides import override, read
from .plan import Cache, Json, ModelRef, OptimizerSpec, Schedule, SourceSpec, Spec, Stage, Term
from .registry import Catalog, Entry
from .runview import RunView
from .tables import (
    CacheTable,
    DataTable,
    ExecuteTable,
    ModelTable,
    Named,
    ObjectiveTable,
    PluginsTable,
    Table,
    TrainTable,
)
from .transforms import holders

AUTO, CHECKED_WITH = "auto", 128
"""A batch size that is settled when a run begins, and what stands for it while a recipe is checked."""
CONSTANT = Schedule().shape  # at its default: it is no part of a key
DEFAULT_OBJECTIVE = (
    ObjectiveTable(loss="cross_entropy", weight=0.1),
    ObjectiveTable(loss="kd", weight=0.9),
)


class Recipe(Options):
    """A whole recipe."""

    seed: int = Field(0, ge=0, lt=2**63, description="a seed from 0")
    threads: int | None = Field(None, ge=1, description="CPU threads of a stage, from 1")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='"auto", "cpu", "cuda" or "cuda:1"')
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description='"float32", or "bfloat16" or "float16" (autocast)'
    )
    channels_last: bool = Field(False, description="true or false")
    compile: bool = Field(False, description="true or false")
    data: DataTable = Field(description='a data set, e.g. data = { name = "digits" }')
    teacher: ModelTable = Field(description='a model, e.g. teacher = { model = "cnn", size = 3 }')
    student: ModelTable = Field(description='a model, e.g. student = { model = "mlp", size = 2 }')
    cache: CacheTable | None = Field(None, description="a table, e.g. cache = { views = 4 }")
    train: TrainTable = Field(TrainTable(), description="a table, e.g. train = { epochs = 30, lr = 0.05 }")
    objective: tuple[ObjectiveTable, ...] = Field(
        DEFAULT_OBJECTIVE, min_length=1, description='a list of tables, e.g. [[objective]] and below it loss = "kd"'
    )
    strategy: Named = Field(
        Named(name="distill"), description='a strategy, e.g. [strategy] and below it name = "distill"'
    )
    controller: tuple[Named, ...] = Field(
        (), description='a list of tables, e.g. [[controller]] and below it name = "dskd"'
    )
    execute: ExecuteTable = Field(ExecuteTable(), description="a table, e.g. execute = { jobs = 2 }")
    plugins: PluginsTable = Field(PluginsTable(), description='a table, e.g. plugins = { require = ["acme>=1.0"] }')


def load(source: str | Path | Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; names are checked by :func:`compile_recipe`.

    Args:
        source: a TOML file, or the same as a mapping.
        sets: overrides like ``train.epochs=5`` or ``objective.1.weight=3``; the value is TOML, else text.

    Raises:
        RecipeError: names the key's path, the value and what to write.
    """
    data = dict(source) if isinstance(source, Mapping) else read(Path(source))
    for text in sets:
        data = override(data, text)
    return validate(Recipe, data)


def compile_recipe(recipe: Recipe, catalog: Catalog) -> tuple[RunView, Spec]:
    """Checks every name and option against the catalog; the recipe as plan words, and its strategy.

    Raises:
        RecipeError: an unknown name or a bad option, with its path.
        PluginError: a name that only a broken plugin offers.
    """
    data = _source(recipe, catalog)
    objective = _objective(recipe.objective, catalog, data)
    optimizer = _optimizer(recipe.train, catalog, _batch_size(recipe), "train")
    teacher_train = _teacher_train(recipe.train)
    if recipe.student.label_map is not None:
        fix = "Give the student the data's classes; only a teacher can have others."
        raise RecipeError("a student has no label map", where="student.label_map", fix=fix)
    view = RunView(
        seed=recipe.seed,
        teacher=_model(recipe.teacher, catalog, "teacher"),
        student=_model(recipe.student, catalog, "student"),
        objective=objective,
        labels=_labels(objective),
        optimizer=optimizer,
        data=data,
        epochs=recipe.train.epochs,
        keep=recipe.train.keep,
        ledger=recipe.train.ledger,
        teacher_epochs=teacher_train.epochs,
        teacher_optimizer=_optimizer(teacher_train, catalog, _batch_size(recipe), "train.teacher"),
        controllers=tuple(_spec("controller", t, catalog, f"controller[{i}]") for i, t in enumerate(recipe.controller)),
        prepare=_prepare(catalog),
        model=lambda table: _strategy_model(table, recipe.strategy, catalog),
        terms=lambda tables: _strategy_terms(tables, recipe.strategy, catalog, data),
    )
    _spec("executor", recipe.execute, catalog, "execute")
    _spec("failure_policy", recipe.execute.failure, catalog, "execute.failure")
    return view, _spec("strategy", recipe.strategy, catalog, "strategy")


def _spec(kind: str, table: Table, catalog: Catalog, where: str) -> Spec:
    name = str(getattr(table, table.name_key))
    entry = catalog.find(kind, name, f"{where}.{table.name_key}")
    return Spec(entry.full_name, _options(entry, table, where))


def _options(entry: Entry, table: Table, where: str) -> dict[str, Json]:
    hidden = (table.name_key, "" if where == "teacher" else "label_map")  # only a teacher can have one
    common = [key for key in type(table).model_fields if key not in hidden]
    return entry.check(table.extras, where, common)


def _model(table: ModelTable, catalog: Catalog, where: str) -> ModelRef:
    told = None if table.weights is None else _told(table.weights, catalog, f"{where}.weights")
    if told is not None and table.model is None:
        table = ModelTable.model_validate({**told.options, **table.model_dump(), "model": told.name})
    if table.model is None:
        what = "missing" if table.weights is None else f"missing: {table.weights} does not say it"
        raise RecipeError(what, where=f"{where}.model", fix='Write a model, e.g. { model = "cnn", size = 3 }.')
    spec = _spec("model", table, catalog, where)
    if told is not None and spec != told:
        what = f"{_shown(spec)} is not what {table.weights} holds, which is {_shown(told)}"
        raise RecipeError(what, where=where, fix="Leave model and options out; the file says them.")
    given = spec.name.startswith(f"{OWN}/") and bool(spec.options["given"])  # it is built with its weights
    label_map = None if table.label_map is None else _spec("label_map", table.label_map, catalog, f"{where}.label_map")
    return ModelRef(spec.name, spec.options, table.weights, given, label_map)


def _told(path: str, catalog: Catalog, where: str) -> Spec | None:
    """The model that a weights file names, with defaults for options that are newer than it; None if it names none."""
    try:
        card = find_card(Path(path))
    except StorageError as error:
        raise RecipeError(str(error), where=where) from error
    if card is None:
        return None
    entry = find_model(card, catalog, where)
    return Spec(entry.full_name, entry.check(card.options, where))


def _shown(spec: Spec) -> str:
    return " ".join([spec.name, *(f"{key}={shown(value)}" for key, value in spec.options.items())])


def _strategy_model(table: Mapping[str, Json], strategy: Named, catalog: Catalog) -> ModelRef:
    """The model that a strategy made of a table; an error names the key of the strategy's options that holds it."""
    where = place_of(table, strategy)
    return _model(validate(ModelTable, table, where), catalog, where)


def _strategy_terms(
    tables: Sequence[Mapping[str, Json]], strategy: Named, catalog: Catalog, data: SourceSpec
) -> tuple[Term, ...]:
    """The objective that a strategy made of tables; errors name keys as :func:`_strategy_model` does."""
    paths = [place_of(table, strategy) for table in tables]
    checked = [validate(ObjectiveTable, table, where) for table, where in zip(tables, paths, strict=True)]
    return _objective(checked, catalog, data, paths)


def place_of(table: Mapping[str, Json], strategy: Named) -> str:
    """The path of the strategy's option that holds a table; "strategy" for one that it made itself."""
    return _find(table, strategy.extras, "strategy") or "strategy"


def _find(wanted: Any, data: Any, where: str) -> str:
    if data == wanted:
        return where
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list | tuple) else ()
    paths = (_find(wanted, v, f"{where}[{k}]" if isinstance(k, int) else f"{where}.{k}") for k, v in items)
    return next(filter(None, paths), "")


def _objective(
    tables: Sequence[ObjectiveTable], catalog: Catalog, data: SourceSpec, paths: Sequence[str] = ()
) -> tuple[Term, ...]:
    paths = paths or [f"objective[{i}]" for i in range(len(tables))]
    terms = tuple(_term(table, catalog, data, where) for table, where in zip(tables, paths, strict=True))
    labels = [term.label for term in terms]
    for i, label in enumerate(labels):  # knobs and curves go by label; "loss" is the sum's
        if label in labels[:i] or label == "loss":
            taken = f"{paths[labels.index(label)]}'s" if label in labels[:i] else "the sum's"
            fix = 'Give this one another: name = "...".'
            raise RecipeError(f"the name {label!r} is {taken}", where=f"{paths[i]}.name", fix=fix)
    return terms


def _term(table: ObjectiveTable, catalog: Catalog, data: SourceSpec, where: str) -> Term:
    entry = catalog.find("loss", table.loss, f"{where}.loss")
    options = _options(entry, table, where)
    checked = entry.options_class()(**options)
    catalog.adapter_of(checked, f"{where}.adapter")
    for option, transform in getattr(checked, "needs_transforms", {}).items():
        if transform not in [spec.name.rpartition("/")[2] for spec in data.transforms]:
            fix = f'Add {{ name = "{transform}", ... }} to data.transforms, or leave {option} out.'
            what = f"{shown(options[option])} needs the transform {transform!r}"
            raise RecipeError(what, where=f"{where}.{option}", fix=fix)
    source = None if getattr(entry.options_class(), "on_labels", False) else "teacher"
    shape = _spec("schedule", table.schedule, catalog, f"{where}.schedule")
    if shape == Spec("core/constant"):
        shape = CONSTANT
    return Term(entry.full_name, source, Schedule(table.weight, table.warmup_epochs, shape), options, table.name)


def _labels(objective: tuple[Term, ...]) -> tuple[Term, ...]:
    """The objective of a member that learns from labels alone: the first label term at weight 1, others in
    proportion. Warm-ups count; schedules do not, since they shape a term against those that are missing here.
    """
    terms = [term for term in objective if term.source is None] or [Term("core/cross_entropy", None, Schedule())]
    weights = [term.weight if isinstance(term.weight, Schedule) else Schedule(term.weight) for term in terms]
    scale = 1 / (weights[0].value or 1.0)
    scaled = [dataclasses.replace(w, value=w.value * scale or 1.0, shape=CONSTANT) for w in weights]
    return tuple(dataclasses.replace(term, weight=weight) for term, weight in zip(terms, scaled, strict=True))


def _optimizer(train: TrainTable, catalog: Catalog, batch_size: int, where: str) -> OptimizerSpec:
    spec = _spec("optimizer", train.optimizer, catalog, f"{where}.optimizer")
    shape = _spec("schedule", train.schedule, catalog, f"{where}.schedule")
    lr = Schedule(_scaled(train, batch_size, where), train.warmup_epochs, shape)
    return OptimizerSpec(spec.name, lr, spec.options, train.clip, train.ema)


def _batch_size(recipe: Recipe) -> int:
    size = recipe.data.batch_size
    return size if isinstance(size, int) else max(CHECKED_WITH, recipe.train.accumulate)


def _scaled(train: TrainTable, batch_size: int, where: str) -> float:
    """The learning rate for this batch size: in proportion (Goyal et al. 2017), or to its root."""
    if train.lr_batch is None:
        if train.lr_scaling is not None:
            fix = "Write the batch size that train.lr is meant for: lr_batch = 256."
            raise RecipeError("there is no lr_batch to scale from", where=f"{where}.lr_scaling", fix=fix)
        return train.lr
    ratio = batch_size / train.lr_batch
    return train.lr * (math.sqrt(ratio) if train.lr_scaling == "sqrt" else ratio)


def _teacher_train(train: TrainTable) -> TrainTable:
    for key in ("teacher", "keep", "ledger", "accumulate"):
        if key in train.teacher:
            fix = (
                "Write its keys one level up." if key == "teacher" else f"It counts for every stage: write train.{key}."
            )
            raise RecipeError("unknown key", where=f"train.teacher.{key}", fix=fix)
    same = train.model_dump(exclude={"teacher", "ema"})  # a moving average is the student's alone
    return validate(TrainTable, {**same, **train.teacher}, "train.teacher")


def _source(recipe: Recipe, catalog: Catalog) -> SourceSpec:
    table = recipe.data
    drop_last = table.drop_last
    if drop_last is None:  # a ragged batch would have other class statistics than the rest
        drop_last = "class" in _values("normalize", [*(t.extras for t in recipe.objective), recipe.strategy.extras])
    return SourceSpec(
        dataset=_spec("dataset", table, catalog, "data"),
        batch_size=_batch_size(recipe),
        monitor=table.monitor,
        split_seed=table.split_seed,
        drop_last=drop_last,
        transforms=_transforms(table, catalog),
        source=_spec("source", table.source, catalog, "data.source"),
        cache=None if recipe.cache is None else Cache(**recipe.cache.model_dump()),
        accumulate=recipe.train.accumulate,
    )


def _values(key: str, data: Any) -> Iterator[Any]:
    """What stands under ``key`` in any table of ``data``, and what a grid has for it under ``term.key``."""
    for name, value in data.items() if isinstance(data, Mapping) else ():
        if name.rpartition(".")[2] == key:
            yield from value if isinstance(value, list | tuple) else (value,)
    for item in data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ():
        yield from _values(key, item)


def _transforms(table: DataTable, catalog: Catalog) -> tuple[Spec, ...]:
    """``shift`` and ``flip``, which most recipes want, come before the list."""
    short = [Named.model_validate({"name": "shift", "pixels": table.shift})] if table.shift else []
    short += [Named(name="flip")] if table.flip else []
    first = [_transform(t, catalog, f"data.{t.name}") for t in short]
    rest = [_transform(t, catalog, f"data.transforms[{i}]") for i, t in enumerate(table.transforms)]
    return (*first, *rest)


def _transform(table: Named, catalog: Catalog, where: str) -> Spec:
    """With those that its options hold checked too: as tables of their full name and all their options."""
    spec = _spec("transform", table, catalog, where)
    options = dict(spec.options)
    for key in holders(spec.name, catalog):
        tables = [validate(Named, item, f"{where}.{key}[{i}]") for i, item in enumerate(options[key])]
        parts = [_transform(item, catalog, f"{where}.{key}[{i}]") for i, item in enumerate(tables)]
        options[key] = [{"name": part.name, **part.options} for part in parts]
    return Spec(spec.name, options)


def _prepare(catalog: Catalog) -> Any:
    def prepare(spec: Spec, stage: Stage, run: RunView) -> Stage:
        entry = catalog.find("controller", spec.name)
        hook = getattr(entry.load(), "prepare", None)
        if hook is None:
            return stage
        prepared: Stage = hook(stage, run, validate(entry.options_class(), spec.options, spec.name))
        return prepared

    return prepare
