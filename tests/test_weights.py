"""Weights files that say what they hold: what is in them, and recipes that name nothing else."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from small import RECIPE, make_run

from kdcore.card import KEY, find_card, read_card
from kdcore.errors import KdError, RecipeError, StorageError
from kdcore.plugins import load_plugins
from kdcore.reading import MOST_HEADER
from kdcore.recipe import compile_recipe, load

HOST = load_plugins()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run, and its teacher as ``teacher.safetensors``."""
    root = tmp_path_factory.mktemp("trained")
    make_run(root, host=HOST).execute()
    source = next(root.glob("store/results/*/teacher.safetensors"))
    (root / "teacher.safetensors").write_bytes(source.read_bytes())
    return root


def with_card(path: Path, target: Path, **changes) -> Path:
    """A copy of a weights file whose card differs."""
    card = {**json.loads(read_card(path).metadata[KEY]), **changes}
    target.write_bytes(save(load_file(path), {KEY: json.dumps(card)}))
    return target


def compiled(table):
    return compile_recipe(load({**RECIPE, "teacher": table}), HOST.catalog)[0]


# ---------------------------------------------------------------- the card


def test_every_delivered_file_says_its_model_and_its_images(trained):
    files = [trained / "run" / "student.safetensors", *trained.glob("store/results/*/*.safetensors")]
    assert len(files) == 3
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert list(metadata) == [KEY]
        card = json.loads(metadata[KEY])
        assert (card["shape"], card["classes"], card["scale"], card["format"]) == ([1, 8, 8], 10, 255, 1)
        assert card["model"] == "vision/mlp"
        size = {"teacher": {"size": 2, "width": 32}, "student": {"size": 1, "width": 64}}[file.stem]
        assert card["options"] == size
        splits = make_run(trained, host=HOST).context.load(compiled(RECIPE["teacher"]).data)
        assert (tuple(card["mean"]), tuple(card["std"])) == (splits.mean, splits.std)


def test_a_card_survives_being_written_and_read(trained, tmp_path):
    card = read_card(trained / "teacher.safetensors")
    (tmp_path / "again.safetensors").write_bytes(save(load_file(trained / "teacher.safetensors"), card.metadata))
    assert (tmp_path / "again.safetensors").read_bytes() == (trained / "teacher.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2}, {"model": 1}, {"options": []}, {"shape": [1, 8]}, {"shape": [1, 8, 2**40]}, {"classes": 0},
        {"mean": [0.1, 0.2]}, {"std": [0.0]}, {"mean": [float("nan")]}, {"scale": 0}, {"more": 1},
    ],
)  # fmt: skip
def test_a_card_that_makes_no_sense_is_refused(trained, tmp_path, changes):
    path = with_card(trained / "teacher.safetensors", tmp_path / "odd.safetensors", **changes)
    with pytest.raises(StorageError, match=r"odd\.safetensors: the card in its metadata cannot be read: .*update\."):
        find_card(path)
    with pytest.raises(RecipeError, match=r"teacher\.weights: .*odd\.safetensors: the card"):
        compiled({"weights": str(path)})


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.none(), st.booleans())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_card_no_card_or_a_storage_error(tmp_path, data, size, nested):
    body = b'{"__metadata__":{"kdcore":"' + b"[" * 50_000 if nested else data
    path = tmp_path / "any.safetensors"
    path.write_bytes((len(body) if size is None else size).to_bytes(8, "little") + body)
    with contextlib.suppress(StorageError):
        assert find_card(path) is None


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write((MOST_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(MOST_HEADER * 4)
    with pytest.raises(StorageError, match="does not begin with the size of a header"):
        find_card(path)


def test_a_pipe_or_a_folder_is_no_weights_file_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with pytest.raises(StorageError, match=r"is no safetensors file: (Not an ordinary|Is a dir|No such)"):
            find_card(path)


# ---------------------------------------------------------------- a recipe of weights alone


def test_weights_alone_have_the_key_of_the_model_spelt_out(trained):
    path = str(trained / "teacher.safetensors")
    tables = [{"weights": path}, {**RECIPE["teacher"], "weights": path}, {"model": "mlp", "size": 2, "width": 32}]
    keys = []
    for table in tables:
        run = make_run(trained, host=HOST, recipe={**RECIPE, "teacher": table}, name="keys")
        teacher = run.view.label_only("teacher", run.view.teacher)
        keys.append((run.keys.of(teacher), run.keys.of(run.view.distilled(run.view.student, teacher["teacher"]))))
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_a_teacher_a_student_and_an_assistant_of_weights_alone_run(trained, tmp_path):
    path = str(trained / "teacher.safetensors")
    recipe = {
        **RECIPE, "teacher": {"weights": path}, "student": {"weights": str(trained / "run" / "student.safetensors")},
        "strategy": {"name": "assistants", "assistants": [{"weights": path}]}, "train": {"epochs": 1},
    }  # fmt: skip
    result = make_run(tmp_path, host=HOST, recipe=recipe).execute()
    before = json.loads((trained / "run" / "result.json").read_bytes())
    assert result["teacher"]["test_accuracy"] == before["teacher"]["test_accuracy"]
    assert [stage["name"] for stage in result["stages"]] == ["mlp-2 (given)", "mlp-2 -> mlp-2", "mlp-2 -> mlp-1"]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"model": "cnn", "size": 2}, r"teacher: vision/cnn size=2 width=1\.0 is not what .* holds, which is"),
        ({"model": "mlp", "size": 3, "width": 32}, r"teacher: vision/mlp size=3 width=32 is not what .* size=2"),
        ({"model": "mlp", "size": 2}, r"teacher: vision/mlp size=2 width=64 is not what"),
        ({"size": 3}, r"teacher: vision/mlp size=3 width=32 is not what .*\. Leave model and options out"),
        ({"sice": 3}, r"teacher\.sice: unknown key\. Did you mean 'size'\?"),
    ],
)  # fmt: skip
def test_a_recipe_that_says_another_model_than_the_file_is_refused(trained, written, says):
    with pytest.raises(RecipeError, match=says):
        compiled({**written, "weights": str(trained / "teacher.safetensors")})


@pytest.mark.parametrize("written", [{"size": 2}, {"model": "mlp"}, {"model": "vision/mlp", "size": 2, "width": 32}])
def test_what_a_recipe_says_again_is_taken_where_it_agrees(trained, tmp_path, written):
    path = trained / "teacher.safetensors"
    if "width" not in written and "model" in written:
        path = with_card(path, tmp_path / "default.safetensors", options={"size": 2})
        written = {**written, "size": 2}
    assert compiled({**written, "weights": str(path)}).teacher.model == "vision/mlp"


def test_a_file_without_a_card_is_told_what_to_write(trained, tmp_path):
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(trained / "teacher.safetensors"), bare)
    with pytest.raises(RecipeError, match=r"teacher\.model: missing: .* does not say it\. Write a model"):
        compiled({"weights": str(bare)})
    assert compiled({**RECIPE["teacher"], "weights": str(bare)}).teacher.weights == str(bare)


def test_a_model_that_is_not_registered_is_refused_with_the_key(trained, tmp_path):
    path = with_card(trained / "teacher.safetensors", tmp_path / "other.safetensors", model="acme/mlpp")
    with pytest.raises(RecipeError, match=r"teacher\.weights: unknown model 'acme/mlpp'"):
        compiled({"weights": str(path)})


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("changes", [{"classes": 11}, {"shape": [1, 16, 16]}])
def test_weights_for_other_images_are_refused_before_the_first_stage(trained, tmp_path, role, changes):
    path = with_card(trained / "teacher.safetensors", tmp_path / "other.safetensors", **changes)
    run = make_run(tmp_path, host=HOST, recipe={**RECIPE, role: {"weights": str(path)}})
    with pytest.raises(RecipeError, match=rf"{role}\.weights: .* takes 1x.*, the data are 1x8x8 images of 10 classes"):
        run.execute()
    assert run.store.stored() == []
    assert run.console.kinds("stage_started") == []


def test_an_assistants_weights_for_other_images_are_refused_too(trained, tmp_path):
    path = with_card(trained / "teacher.safetensors", tmp_path / "other.safetensors", shape=[1, 4, 16])
    recipe = {**RECIPE, "strategy": {"name": "assistants", "assistants": [{"weights": str(path)}]}}
    with pytest.raises(RecipeError, match=r"model mlp-2: .* takes 1x4x16 images"):
        make_run(tmp_path, host=HOST, recipe=recipe).execute()


def test_a_teacher_that_saw_other_contrast_is_a_warning(trained, tmp_path):
    near = with_card(trained / "teacher.safetensors", tmp_path / "near.safetensors", mean=[0.31])
    far = with_card(trained / "teacher.safetensors", tmp_path / "far.safetensors", std=[0.2])
    found = {}
    for path in (near, far):
        recipe = {**RECIPE, "teacher": {"weights": str(path)}, "train": {"epochs": 1}}
        result = make_run(tmp_path, host=HOST, recipe=recipe, name=path.stem).execute()
        found[path.stem] = [text for text in result["warnings"] if "deviation 0.2, here" in text]
    assert found["near"] == []
    assert len(found["far"]) == 1


WATCH_TORCH = """
import sys
from kdcore.errors import RecipeError
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load
recipe = {"data": "digits", "teacher": {"weights": sys.argv[1]}, "student": {"model": "mlp", "size": 1}}
recipe["data"] = {"name": "digits"}
print(compile_recipe(load(recipe), load_plugins().catalog)[0].teacher, "torch" in sys.modules)
"""


def test_a_card_is_read_without_torch(trained, shell):
    done = shell("-c", WATCH_TORCH, trained / "teacher.safetensors")
    assert (done.out, done.code) == ("mlp-2 False\n", 0), done.err


def test_kdcores_errors_are_all_that_a_damaged_file_gives(trained, tmp_path):
    data = (trained / "teacher.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for cut in (0, 7, 8, 9, 100, 400, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(KdError):
            make_run(tmp_path, host=HOST, recipe={**RECIPE, "teacher": {"weights": str(path)}}, name=str(cut)).execute()
