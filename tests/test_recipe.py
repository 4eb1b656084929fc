"""Recipes: what is wrong, where, and what to write instead; all of it before torch is imported."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Done
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.errors import PluginError, RecipeError
from kdcore.options import Field, Options
from kdcore.plugins import PluginHost, load_plugins
from kdcore.recipe import compile_recipe, load
from kdcore.registry import Catalog, Entry, Origin

BASE = tomllib.loads(TINY)


@pytest.fixture(scope="module")
def host() -> PluginHost:
    return load_plugins()


def check(data: dict[str, Any], host: PluginHost, *sets: str) -> Any:
    """The whole check of a recipe, as every command does it."""
    recipe = load(data, sets)
    return compile_recipe(recipe, host.catalog)


def fault(host: PluginHost, change: dict[str, Any], *sets: str) -> str:
    with pytest.raises(RecipeError) as error:
        check({**BASE, **change}, host, *sets)
    return str(error.value)


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("change", "where", "meant"),
    [
        ({"sede": 1}, "sede", "'seed'"),
        ({"studnet": {"model": "mlp"}}, "studnet", "'student'"),
        ({"train": {"epohs": 1}}, "train.epohs", "'epochs'"),
        ({"train": {"teacher": {"epohs": 1}}}, "train.teacher.epohs", "'epochs'"),
        ({"train": {"optimizer": {"name": "sgd", "momentun": 0.9}}}, "train.optimizer.momentun", "'momentum'"),
        ({"data": {"name": "digits", "batchsize": 4}}, "data.batchsize", "'batch_size'"),
        ({"data": {"name": "digits", "tset": 0.1}}, "data.tset", "'test'"),
        ({"student": {"model": "mlp", "size": 1, "wieghts": "x"}}, "student.wieghts", "'weights'"),
        ({"student": {"model": "mlp", "sice": 1}}, "student.sice", "'size'"),
        ({"objective": [{"loss": "kd"}, {"loss": "dkd", "temprature": 1}]}, "objective[1].temprature", "'temperature'"),
        ({"objective": [{"loss": "dkd", "wieght": 1}]}, "objective[0].wieght", "'weight'"),
        ({"strategy": {"name": "assistants", "asistants": []}}, "strategy.asistants", "'assistants'"),
        ({"controller": [{"name": "dskd", "patiense": 3}]}, "controller[0].patiense", "'patience'"),
        ({"execute": {"jbos": 2}}, "execute.jbos", "'jobs'"),
        ({"plugins": {"required": []}}, "plugins.required", "'require'"),
    ],
)
def test_unknown_key_gets_a_did_you_mean(host: PluginHost, change: dict[str, Any], where: str, meant: str) -> None:
    assert fault(host, change) == f"{where}: unknown key. Did you mean {meant}?"


def test_key_in_the_wrong_table_is_told_its_place(host: PluginHost) -> None:
    assert fault(host, {"lr": 0.1}) == "lr: unknown key. Write it as train.lr."
    assert fault(host, {"train": {"batch_size": 4}}) == "train.batch_size: unknown key. Write it as data.batch_size."
    assert fault(host, {"train": {"seed": 4}}) == "train.seed: unknown key. Write it as seed."


def test_options_of_what_takes_none_are_refused(host: PluginHost) -> None:
    text = fault(host, {"strategy": {"name": "distill", "x": 1}})
    assert text == "strategy.x: unknown key. It takes no options."


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"seed": "one"}, "seed", "'one' is not a whole number"),
        ({"seed": True}, "seed", "true is not a whole number"),
        ({"seed": -1}, "seed", "-1 is below 0"),
        ({"seed": 2**64}, "seed", f"{2**64} is not below {2**63}"),
        ({"device": "gpu"}, "device", "'gpu' does not fit"),
        ({"precision": "float16"}, "precision", "'float16' is not 'float32' or 'bfloat16'"),
        ({"channels_last": "yes"}, "channels_last", "'yes' is not true or false"),
        ({"train": 5}, "train", "5 is not a table"),
        ({"train": {"epochs": "5"}}, "train.epochs", "'5' is not a whole number"),
        ({"train": {"epochs": 1.5}}, "train.epochs", "1.5 is not a whole number"),
        ({"train": {"epochs": 0}}, "train.epochs", "0 is below 1"),
        ({"train": {"lr": True}}, "train.lr", "true is not a number"),
        ({"train": {"lr": float("nan")}}, "train.lr", "nan is not finite"),
        ({"train": {"lr": float("inf")}}, "train.lr", "inf is not finite"),
        ({"train": {"teacher": {"epochs": 0}}}, "train.teacher.epochs", "0 is below 1"),
        ({"train": {"teacher": {"teacher": {}}}}, "train.teacher.teacher", "unknown key"),
        ({"train": {"optimizer": 3}}, "train.optimizer", "3 is not a table"),
        ({"train": {"schedule": "step"}}, "train.schedule.milestones", "missing"),
        ({"data": "digits"}, "data", "'digits' is not a table"),
        ({"data": {"name": "digits", "monitor": 1.0}}, "data.monitor", "1.0 is not below 1"),
        ({"data": {"name": "digits", "test": 2}}, "data.test", "2 is not below 1"),
        ({"data": {"name": "digits", "transforms": "flip"}}, "data.transforms", "'flip' is not a list"),
        ({"data": {"name": "digits", "transforms": [3]}}, "data.transforms[0]", "3 is not a table"),
        ({"data": {"name": "mnist"}}, "data.root", "missing"),
        ({"student": {"size": 1}}, "student.model", "missing"),
        ({"student": "mlp"}, "student.size", "missing"),
        ({"student": {"model": "mlp", "size": 1, "weights": "no.safetensors"}}, "student.weights", "'no.safetensors'"),
        ({"objective": []}, "objective", "[] has 0 items"),
        ({"objective": {"loss": "kd"}}, "objective", "{'loss': 'kd'} is not a list"),
        ({"objective": ["kd"]}, "objective[0]", "'kd' is not a table"),
        ({"objective": [{"loss": "kd", "weight": -1}]}, "objective[0].weight", "-1 is below 0"),
        ({"objective": [{"loss": "kd", "temperature": 0}]}, "objective[0].temperature", "0 is not above 0"),
        ({"objective": [{"loss": "kd", "normalize": "x"}]}, "objective[0].normalize", "'x' is not 'none', 'class'"),
        ({"objective": [{"loss": "kd"}, {"loss": "kd"}]}, "objective[1].name", "the name 'kd' is objective[0]'s"),
        ({"objective": [{"loss": "kd", "name": "a.b"}]}, "objective[0].name", "'a.b' does not fit"),
        ({"objective": [{"loss": "kd", "name": "loss"}]}, "objective[0].name", "the name 'loss' is the sum's"),
        ({"controller": {"name": "dskd"}}, "controller", "{'name': 'dskd'} is not a list"),
        ({"controller": [{"name": "dskd", "patience": 0}]}, "controller[0].patience", "0 is below 1"),
        ({"execute": {"jobs": 0}}, "execute.jobs", "0 is below 1"),
        ({"plugins": {"require": "acme"}}, "plugins.require", "'acme' is not a list"),
    ],
)
def test_wrong_value_is_named_with_path_and_remedy(
    host: PluginHost, change: dict[str, Any], where: str, what: str
) -> None:
    text = fault(host, change)
    assert text.startswith(f"{where}: {what}")
    assert ". Write " in text or ". Give " in text
    assert "Input should" not in text  # pydantic's words are for programmers


def test_long_value_is_cut(host: PluginHost) -> None:
    assert len(fault(host, {"seed": "x" * 5000})) < 150


def test_missing_table_says_what_to_write(host: PluginHost) -> None:
    with pytest.raises(RecipeError, match=r'student: missing\. Write a model, e\.g\. student = \{ model = "mlp"'):
        check({key: value for key, value in BASE.items() if key != "student"}, host)


def test_item_of_transforms_keeps_its_index_beside_shift(host: PluginHost) -> None:
    text = fault(host, {"data": {"name": "digits", "shift": 1, "transforms": ["flop"]}})
    assert text == "data.transforms[0].name: unknown transform 'flop'. Did you mean 'flip'?"


def test_model_of_a_strategy_is_named_by_its_key(host: PluginHost) -> None:
    assistants = {"name": "assistants", "assistants": [{"model": "mlp", "size": 2}, {"model": "mlpp", "size": 2}]}
    view, strategy = check({**BASE, "strategy": assistants}, host)
    with pytest.raises(RecipeError, match=r"strategy\.assistants\[1\]\.model: unknown model 'mlpp'"):
        [view.model(table) for table in strategy.options["assistants"]]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data": {"name": "digit"}}, "data.name: unknown data set 'digit'. Did you mean 'digits'?"),
        ({"student": {"model": "mpl"}}, "student.model: unknown model 'mpl'. Did you mean 'mlp'?"),
        ({"student": {"model": "vison/mlp"}}, "student.model: unknown model 'vison/mlp'. Did you mean 'vision/mlp'?"),
        ({"objective": [{"loss": "dkk"}]}, "objective[0].loss: unknown loss 'dkk'. Did you mean 'dkd'?"),
        ({"train": {"optimizer": "adm"}}, "train.optimizer.name: unknown optimizer 'adm'. Did you mean 'adamw'?"),
        ({"train": {"schedule": "cosin"}}, "train.schedule.name: unknown schedule 'cosin'. Did you mean 'cosine'?"),
        ({"strategy": "distil"}, "strategy.name: unknown strategy 'distil'. Did you mean 'distill'?"),
        ({"controller": ["dksd"]}, "controller[0].name: unknown controller 'dksd'. Did you mean 'dskd'?"),
        ({"execute": {"name": "ray"}}, "execute.name: unknown executor 'ray'. Known: local."),
    ],
)
def test_unknown_name_gets_a_did_you_mean(host: PluginHost, change: dict[str, Any], text: str) -> None:
    assert fault(host, change) == text


def test_name_of_another_kind_is_told_apart(host: PluginHost) -> None:
    text = fault(host, {"controller": ["assistants"]})
    assert text == "controller[0].name: unknown controller 'assistants'. 'assistants' is a strategy, not a controller."


def test_many_known_names_are_not_all_listed(host: PluginHost) -> None:
    text = fault(host, {"student": {"model": "zzz"}})
    assert "`kdcore plugins` lists the" in text
    assert len(text) < 120


def entry(plugin: str, name: str, **about: Any) -> Entry:
    return Entry("model", name, Origin(plugin), object(), **about)


def test_ambiguous_name_lists_what_to_write() -> None:
    catalog = Catalog()
    catalog.add(entry("acme", "net"))
    catalog.add(entry("beta", "net"))
    with pytest.raises(RecipeError) as error:
        catalog.find("model", "net", "student.model")
    expected = "student.model: model 'net' is ambiguous: 2 plugins offer it. Write 'acme/net' or 'beta/net'."
    assert str(error.value) == expected
    assert catalog.find("model", "beta/net").origin.plugin == "beta"


# ---------------------------------------------------------------- options of plugins


class Sized(Options):
    """Of an imaginary plugin."""

    size: int = Field(1, ge=1, description="a size from 1")
    scale: float = 1.0
    pair: tuple[float, float] = (0.0, 1.0)
    mode: float | None = None


def test_options_of_a_plugin_are_checked_by_its_own_model() -> None:
    entry_ = entry("acme", "net", options=Sized)
    assert entry_.check({"size": 3, "scale": 2, "pair": [1, 2]}, "student") == {
        "size": 3, "scale": 2.0, "pair": [1.0, 2.0], "mode": None,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"student\.size: 0 is below 1\. Write a size from 1\."):
        entry_.check({"size": 0}, "student")
    with pytest.raises(RecipeError, match=r"student\.mode: 'x' is not a number"):
        entry_.check({"mode": "x"}, "student")
    with pytest.raises(RecipeError, match=r"student\.sice: unknown key. Did you mean 'size'\?"):
        entry_.check({"sice": 0}, "student")


def test_options_that_are_no_options_class_blame_the_plugin() -> None:
    with pytest.raises(PluginError, match=r"Derive them from kdcore\.Options"):
        entry("acme", "net", options=dict).options_class()


# ---------------------------------------------------------------- --set


def test_set_overrides_one_key(host: PluginHost) -> None:
    two = {**BASE, "objective": [{"loss": "cross_entropy"}, {"loss": "dkd"}]}
    assert load(two, ["train.epochs=5"]).train.epochs == 5
    assert load(two, ["objective.1.weight=3"]).objective[1].weight == 3
    assert load(two, ["objective[1].weight=3"]).objective[1].weight == 3
    assert load(two, ["train.lr=1e-3", "train.keep=best"]).train.keep == "best"
    assert load(two, ["data.name=synthetic"]).data.name == "synthetic"  # text needs no quotes
    assert load(two, ["device=cuda:1"]).device == "cuda:1"
    assert load(two, ["student={ model = 'cnn', size = 2 }"]).student.extras == {"size": 2}
    assert load(two, ["execute.jobs=2"]).execute.jobs == 2
    assert two["objective"] == [{"loss": "cross_entropy"}, {"loss": "dkd"}]  # what was given stays as it was


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train.epochs", "--set: 'train.epochs' sets nothing. Write --set train.epochs=5."),
        ("=5", "--set: '=5' sets nothing"),
        ("train..epochs=5", "--set: 'train..epochs=5' sets nothing"),
        ("train.epohs=5", "train.epohs: unknown key. Did you mean 'epochs'?"),
        ("train.epochs=many", "train.epochs: 'many' is not a whole number"),
        ("seed.x=1", "--set seed.x: 0 is not a table, so it has no 'x'"),
        ("controller.1.patience=2", "--set controller.1.patience: '1' is no item; the recipe has items 0 to 0"),
        ("controller.-1.patience=2", "--set controller.-1.patience: '-1' is no item"),
        ("controller.².patience=2", "--set controller.².patience: '²' is no item"),
        ("objective.0.weight=2", "--set objective.0.weight: the recipe has no list with an item 0"),
        ("seed=1\nthreads=2", "seed: '1\\nthreads=2' is not a whole number"),
        ("seed=" + "[" * 5000, "seed: '[["),
    ],
)
def test_bad_set_says_what_is_wrong(host: PluginHost, text: str, says: str) -> None:
    assert fault(host, {"controller": [{"name": "dskd"}]}, text).startswith(says)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"seed = ", "not TOML: Invalid value"),
        (b"student = mlp", "not TOML: "),
        (b"\xff\xfe\x00", "not TOML: 'utf-8' codec"),
        (b"PK\x03\x04", "not TOML: "),
        (b"x = " + b"[" * 20000, "not TOML: "),
        (b"", "data: missing"),
    ],
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        load(path)
    assert says in str(error.value)
    assert error.value.fix


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file\. Give the path"):
        load(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"cannot be read: Is a directory"):
        load(tmp_path)


def test_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TINY.encode())
    assert load(path).seed == 0


def test_recipe_survives_its_own_json(host: PluginHost) -> None:
    rich = {
        **BASE,
        "train": {"epochs": 2, "schedule": {"name": "step", "milestones": [1, 2]}, "teacher": {"epochs": 3}},
    }
    recipe = load({**rich, "objective": [{"loss": "dkd", "warmup_epochs": 1}], "controller": ["dskd"]})
    again = load(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again == recipe
    assert compile_recipe(again, host.catalog)[0].teacher_epochs == 3


# ---------------------------------------------------------------- the command

WATCH_TORCH = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules))
from kdcore.cli import main
main()
"""


def test_bad_key_exits_2_with_one_message_and_without_torch(
    tiny: Callable[..., Path], shell: Callable[..., Done]
) -> None:
    done = shell("-c", WATCH_TORCH, "run", tiny("epochs = 5"))
    assert (done.code, done.out) == (2, "False\n")
    assert done.err == "kdcore: RecipeError: epochs: unknown key. Write it as train.epochs.\n"


@pytest.mark.xfail(strict=True, reason="kdcore.training and the source `epochs` of builtin.py import torch")
@pytest.mark.parametrize("command", ["run", "plan"])
def test_bad_recipe_exits_2_with_one_message_and_without_torch(
    tiny: Callable[..., Path], shell: Callable[..., Done], command: str
) -> None:
    recipe = tiny('[strategy]\nname = "assistants"\nassistants = [{ model = "mlpp", size = 2 }]')
    done = shell("-c", WATCH_TORCH, command, recipe)
    assert (done.code, done.out) == (2, "False\n")
    expected = "kdcore: RecipeError: strategy.assistants[0].model: unknown model 'mlpp'. Did you mean 'mlp'?\n"
    assert done.err == expected


# ---------------------------------------------------------------- mutations

PATHS = [(key,) for key in BASE] + [
    (key, inner) for key, value in BASE.items() if isinstance(value, dict) for inner in value
]
KEYS = st.sampled_from(
    [
        "seed", "data", "name", "model", "size", "train", "epochs", "lr", "optimizer", "schedule", "objective", "loss",
        "weight", "strategy", "controller", "execute", "jobs", "plugins", "require", "weights", "transforms", "source",
        "teacher", "threads", "device", "shift", "flip", "",
    ]
) | st.text(max_size=5)  # fmt: skip
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=3)
    | st.sampled_from(["mlp", "cnn", "digits", "kd", "dkd", "core/kd", "vision/", "/", "step", "best", "cuda:1", "."])
)  # fmt: skip
VALUES = st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=6)


@given(st.lists(st.tuples(st.sampled_from(PATHS) | st.lists(KEYS, min_size=1, max_size=3), VALUES), max_size=3))
@settings(max_examples=300, deadline=None)
def test_mutated_recipe_loads_or_raises_recipe_error(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    data: Any = json.loads(json.dumps(BASE))
    for path, value in changes:
        table = data
        for key in path[:-1]:
            table = table.setdefault(key, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict):
            table[path[-1]] = value
    with contextlib.suppress(RecipeError):
        check(data, HOST)


@given(st.text(max_size=12), st.text(max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_set_loads_or_raises_recipe_error(path: str, value: str) -> None:
    with contextlib.suppress(RecipeError):
        load(BASE, [f"{path}={value}"])


HOST = load_plugins()
