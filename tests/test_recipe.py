"""Recipes: what is wrong, where, and what to write instead; all of it before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faulty import BASE, check, fault

from kdcore.errors import PluginError, RecipeError
from kdcore.options import Field, Options
from kdcore.origin import Origin
from kdcore.plugins import PluginHost
from kdcore.recipe import compile_recipe, load
from kdcore.registry import Catalog, Entry

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
        ({"precision": "float64"}, "precision", "'float64' is not 'float32', 'bfloat16' or 'float16'"),
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
        ({"student": "resnet8x4"}, "student.model: unknown model 'resnet8x4'. Did you mean 'cifar_resnet8x4'?"),
        ({"student": {"model": "cifar_resnet8", "size": 3}}, "student.size: unknown key. Known: weights."),
        (
            {"objective": [{"loss": "attention"}]},
            "objective[0].loss: unknown loss 'attention'. 'attention' is an adapter, not a loss.",
        ),
        ({"objective": [{"loss": "dkk"}]}, "objective[0].loss: unknown loss 'dkk'. Did you mean 'dkd'?"),
        ({"train": {"optimizer": "adm"}}, "train.optimizer.name: unknown optimizer 'adm'. Did you mean 'adamw'?"),
        ({"train": {"schedule": "cosin"}}, "train.schedule.name: unknown schedule 'cosin'. Did you mean 'cosine'?"),
        ({"strategy": "distil"}, "strategy.name: unknown strategy 'distil'. Did you mean 'distill'?"),
        ({"controller": ["dksd"]}, "controller[0].name: unknown controller 'dksd'. Did you mean 'dskd'?"),
        ({"execute": {"name": "locl"}}, "execute.name: unknown executor 'locl'. Did you mean 'local'?"),
    ],
)
def test_unknown_name_gets_a_did_you_mean(host: PluginHost, change: dict[str, Any], text: str) -> None:
    assert fault(host, change) == text


def test_named_taps_are_as_many_on_both_sides_and_one_needs_no_list(host: PluginHost) -> None:
    two = {"loss": "fitnet", "student": ["stage1", "stage2"]}
    says = "objective[0]: does not fit: the student's taps are stage1, stage2, the teacher's are stage2: they"
    assert fault(host, {"objective": [two]}).startswith(says)
    check({**BASE, "objective": [{**two, "teacher": ["stage?"]}]}, host)  # a pattern pairs from the deepest on
    view, _ = check({**BASE, "objective": [{"loss": "fitnet", "student": "stage1"}]}, host)
    assert view.objective[0].options["student"] == ["stage1"]


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


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_the_recipes_of_table_1_are_sound_and_their_assistants_lie_between_student_and_teacher(host, name):
    path = Path(__file__).parents[1] / "examples" / f"dskd_{name}.toml"
    view, _ = compile_recipe(load(path), host.catalog)
    candidates = [view.model(table) for table in load(path).strategy.extras["candidates"]]
    sizes = [model.options["size"] for model in (view.student, *candidates, view.teacher)]
    assert sizes == sorted(set(sizes))
    assert {model.model for model in candidates} == {view.student.model}
    assert view.data.dataset.name == f"core/{name}"
    assert view.controllers[0].options["patience"] == 3
