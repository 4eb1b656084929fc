"""Recipes: TOML, checked whole before torch is imported, and turned into the words of a plan."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from .errors import RecipeError
from .options import Field, Options, validate
from .plan import Json, ModelRef, OptimizerSpec, RunView, Schedule, SourceSpec, Spec, Stage, Term
from .registry import Catalog, Entry


class Table(BaseModel):
    """A table whose further keys are options of the thing it names."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name_key: ClassVar[str] = "name"

    @property
    def extras(self) -> dict[str, Json]:
        return dict(self.model_extra or {})


class Named(Table):
    """``"cosine"``, or ``{ name = "step", milestones = [30, 60] }``."""

    name: str = Field(description='a name, or { name = "...", key = value }')

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class ModelTable(Table):
    """``{ model = "cnn", size = 3 }``; further keys are the model's options."""

    name_key: ClassVar[str] = "model"
    model: str = Field(description='a model, e.g. { model = "cnn", size = 3 }')
    weights: str | None = Field(None, description="the path of a .safetensors file")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data


class DataTable(Table):
    """The data set by name, its options, batches, split and augmentation."""

    name: str = Field(description='a data set, e.g. "digits"')
    batch_size: int = Field(128, ge=1, description="a number of samples from 1")
    monitor: float = Field(0.1, gt=0, lt=1, description="the share of training data held out for decisions, e.g. 0.1")
    split_seed: int = Field(0, ge=0, description="a seed from 0")
    drop_last: bool | None = Field(None, description="true or false")
    shift: int = Field(0, ge=0, description="pixels of random translation, e.g. 1 (CIFAR: 4)")
    flip: bool = Field(False, description="true or false")
    transforms: tuple[Named, ...] = Field((), description="a list of names")
    source: Named = Named(name="epochs")


class TrainTable(Options):
    """How members are trained."""

    epochs: int = Field(30, ge=1, description="a number of epochs from 1")
    lr: float = Field(0.05, gt=0, description="a learning rate above 0")
    optimizer: Named = Named(name="sgd")
    schedule: Named = Named(name="cosine")
    warmup_epochs: float = Field(0, ge=0, description="epochs of linear warm-up, from 0")
    clip: float | None = Field(None, gt=0, description="the largest gradient norm")
    keep: Literal["last", "best"] = Field("last", description='"last", or "best" (on the monitor split)')
    teacher: dict[str, Any] = Field({}, description="keys of train that differ for the teacher")


class ObjectiveTable(Table):
    """One term of the student's objective; further keys are the loss's options."""

    name_key: ClassVar[str] = "loss"
    loss: str = Field(description='a loss, e.g. "dkd"')
    name: str = Field("", description="a name for knobs and curves")
    weight: float = Field(1.0, ge=0, description="a weight from 0")
    warmup_epochs: float = Field(0, ge=0, description="epochs over which the weight grows, from 0")


class ExecuteTable(Table):
    """Where stages run."""

    name: str = "local"
    jobs: int = Field(1, ge=1, description="how many stages may run at once, from 1")
    log_every: int = Field(50, ge=1, description="steps between two log points")
    checkpoint_seconds: float = Field(20, ge=0, description="seconds between checkpoints; 0 for every epoch")


class PluginsTable(Options):
    """What must be installed."""

    require: tuple[str, ...] = Field((), description='a list like ["acme>=1.0"]')


DEFAULT_OBJECTIVE = (
    ObjectiveTable(loss="cross_entropy", weight=0.1),
    ObjectiveTable(loss="kd", weight=0.9),
)


class Recipe(Options):
    """A whole recipe."""

    seed: int = Field(0, ge=0, description="a seed from 0")
    threads: int | None = Field(None, ge=1, description="CPU threads of a stage, from 1")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='"auto", "cpu", "cuda" or "cuda:1"')
    precision: Literal["float32", "bfloat16"] = Field("float32", description='"float32" or "bfloat16" (autocast)')
    channels_last: bool = False
    data: DataTable = Field(description='a data set, e.g. data = { name = "digits" }')
    teacher: ModelTable = Field(description='a model, e.g. teacher = { model = "cnn", size = 3 }')
    student: ModelTable = Field(description='a model, e.g. student = { model = "mlp", size = 2 }')
    train: TrainTable = TrainTable()
    objective: tuple[ObjectiveTable, ...] = Field(DEFAULT_OBJECTIVE, min_length=1, description="[[objective]] tables")
    strategy: Named = Named(name="distill")
    controller: tuple[Named, ...] = ()
    execute: ExecuteTable = ExecuteTable()
    plugins: PluginsTable = PluginsTable()


def load(source: str | Path | Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; names are checked by :func:`compile_recipe`.

    Args:
        source: a TOML file, or the same as a mapping.
        sets: overrides like ``train.epochs=5`` or ``objective.1.weight=3``; the value is TOML, else text.

    Raises:
        RecipeError: names the key's path, the value and what to write.
    """
    data = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    for text in sets:
        data = _override(data, text)
    return validate(Recipe, data)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError("no such file", where=str(path), fix="Give the path of a .toml recipe.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(error), where=str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not TOML: {error}", where=str(path)) from None


def _override(data: Any, text: str) -> Any:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"{text!r} sets nothing", where="--set", fix="Write --set train.epochs=5.")
    keys = path.strip().replace("[", ".").replace("]", "").split(".")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return _replaced(data, keys, parsed, path)


def _replaced(data: Any, keys: list[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(data, list):
        if not key.isdigit() or int(key) >= len(data):
            raise RecipeError(f"{key!r} is no item of a list of {len(data)}", where=f"--set {path}", fix="Count from 0.")
        copy = list(data)
        copy[int(key)] = _replaced(copy[int(key)], rest, value, path)
        return copy
    if not isinstance(data, Mapping | None):
        raise RecipeError(f"{data!r} is not a table, so it has no {key!r}", where=f"--set {path}")
    return {**(data or {}), key: _replaced((data or {}).get(key), rest, value, path)}


def compile_recipe(recipe: Recipe, catalog: Catalog) -> tuple[RunView, Spec]:
    """Checks every name and option against the catalog; the recipe as plan words, and its strategy.

    Raises:
        RecipeError: an unknown name or a bad option, with its path.
        PluginError: a name that only a broken plugin offers.
    """
    objective = tuple(_term(t, catalog, f"objective[{i}]") for i, t in enumerate(recipe.objective))
    optimizer = _optimizer(recipe.train, catalog, "train")
    teacher_train = _teacher_train(recipe.train)
    view = RunView(
        seed=recipe.seed,
        teacher=_model(recipe.teacher, catalog, "teacher"),
        student=_model(recipe.student, catalog, "student"),
        objective=objective,
        labels=_labels(objective),
        optimizer=optimizer,
        data=_source(recipe, catalog),
        epochs=recipe.train.epochs,
        keep=recipe.train.keep,
        teacher_epochs=teacher_train.epochs,
        teacher_optimizer=_optimizer(teacher_train, catalog, "train.teacher"),
        controllers=tuple(_spec("controller", t, catalog, f"controller[{i}]") for i, t in enumerate(recipe.controller)),
        prepare=_prepare(catalog),
        model=lambda table: _model(validate(ModelTable, table, "strategy"), catalog, "strategy"),
    )
    _spec("executor", recipe.execute, catalog, "execute")
    return view, _spec("strategy", recipe.strategy, catalog, "strategy")


def _spec(kind: str, table: Table, catalog: Catalog, where: str) -> Spec:
    name = str(getattr(table, table.name_key))
    entry = catalog.find(kind, name, f"{where}.{table.name_key}")
    return Spec(entry.full_name, _options(entry, table, where))


def _options(entry: Entry, table: Table, where: str) -> dict[str, Json]:
    common = [key for key in type(table).model_fields if key != table.name_key]
    return entry.check(table.extras, where, common)


def _model(table: ModelTable, catalog: Catalog, where: str) -> ModelRef:
    if table.weights is not None and not Path(table.weights).is_file():
        raise RecipeError(f"{table.weights!r} is no file", where=f"{where}.weights", fix="Write a .safetensors path.")
    spec = _spec("model", table, catalog, where)
    return ModelRef(spec.name, spec.options, table.weights)


def _term(table: ObjectiveTable, catalog: Catalog, where: str) -> Term:
    entry = catalog.find("loss", table.loss, f"{where}.loss")
    options = _options(entry, table, where)
    source = None if getattr(entry.options_class(), "on_labels", False) else "teacher"
    return Term(entry.full_name, source, Schedule(table.weight, table.warmup_epochs), options, table.name)


def _labels(objective: tuple[Term, ...]) -> tuple[Term, ...]:
    """The objective of a member that learns from labels alone: the label terms, the first at weight 1."""
    terms = [term for term in objective if term.source is None] or [Term("core/cross_entropy", None)]
    return tuple(dataclasses.replace(term, weight=1.0) for term in terms)


def _optimizer(train: TrainTable, catalog: Catalog, where: str) -> OptimizerSpec:
    spec = _spec("optimizer", train.optimizer, catalog, f"{where}.optimizer")
    shape = _spec("schedule", train.schedule, catalog, f"{where}.schedule")
    return OptimizerSpec(spec.name, Schedule(train.lr, train.warmup_epochs, shape), spec.options, train.clip)


def _teacher_train(train: TrainTable) -> TrainTable:
    own = {key: getattr(train, key) for key in TrainTable.model_fields if key != "teacher"}
    return validate(TrainTable, {**own, **train.teacher}, "train.teacher")


def _source(recipe: Recipe, catalog: Catalog) -> SourceSpec:
    table = recipe.data
    transforms = [Named.model_validate({"name": "shift", "pixels": table.shift})] if table.shift else []
    transforms += [Named(name="flip")] if table.flip else []
    transforms += table.transforms
    drop_last = table.drop_last
    if drop_last is None:  # a ragged batch would have other class statistics than the rest
        drop_last = any((t.model_extra or {}).get("normalize") == "class" for t in recipe.objective)
    return SourceSpec(
        dataset=_spec("dataset", table, catalog, "data"),
        batch_size=table.batch_size,
        monitor=table.monitor,
        split_seed=table.split_seed,
        drop_last=drop_last,
        transforms=tuple(_spec("transform", t, catalog, f"data.transforms[{i}]") for i, t in enumerate(transforms)),
        source=_spec("source", table.source, catalog, "data.source"),
    )


def _prepare(catalog: Catalog) -> Any:
    def prepare(spec: Spec, stage: Stage, run: RunView) -> Stage:
        entry = catalog.find("controller", spec.name)
        hook = getattr(entry.load(), "prepare", None)
        if hook is None:
            return stage
        prepared: Stage = hook(stage, run, validate(entry.options_class(), spec.options, spec.name))
        return prepared

    return prepare
