"""A recipe's text: files, --set, and whatever a hand or a program may write into one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Done
from faulty import BASE, check, fault
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.errors import RecipeError
from kdcore.plugins import PluginHost, load_plugins
from kdcore.recipe import compile_recipe, load

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
    view, same = (compile_recipe(r, host.catalog)[0] for r in (recipe, again))
    assert same.teacher_epochs == 3
    for part in ("objective", "labels", "optimizer", "teacher_optimizer", "data", "student", "controllers"):
        assert repr(getattr(same, part)) == repr(getattr(view, part))  # 0 and 0.0 are equal, their keys are not


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
@settings(max_examples=300)
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
@settings(max_examples=300)
def test_any_set_loads_or_raises_recipe_error(path: str, value: str) -> None:
    with contextlib.suppress(RecipeError):
        load(BASE, [f"{path}={value}"])


HOST = load_plugins()
