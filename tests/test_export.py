"""Trained models as files for others: every export is read again and gives the same logits, or is not there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from small import PROOFS, RECIPE, make_run

import kdcore
from kdcore.card import KEY, Card, read_card
from kdcore.deploy import exporters
from kdcore.deploy.classifier import Classifier
from kdcore.deploy.export import Match, export
from kdcore.errors import NumericError, PluginError, RecipeError, StorageError
from kdcore.plugins import load_plugins
from kdcore.testing.faults import failing_disk

HOST = load_plugins()
ONNX = all(importlib.util.find_spec(name) for name in exporters.NEEDED)
needs_onnx = pytest.mark.skipif(not ONNX, reason="onnx, onnxscript or onnxruntime is not installed")
FORMATS = ["safetensors", "torch-export", pytest.param("onnx", marks=needs_onnx)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run; its teacher has batch norm, dropout-free."""
    root = tmp_path_factory.mktemp("trained")
    recipe = {**RECIPE, "teacher": {"model": "cnn", "size": 2, "width": 0.25}, "train": {"epochs": 1}}
    make_run(root, host=HOST, recipe=recipe).execute()
    return root / "run"


@pytest.fixture(scope="module")
def model(run):
    return kdcore.load_model(run / "student.safetensors")


def exported(model, name, path, batch=4, **options):
    entry = HOST.catalog.find("exporter", name)
    return export(model, entry, entry.options_class()(**options), path, batch)


def reader(name, path):
    """The exported file as its readers use it, without kdcore."""
    if name == "torch-export":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


# ---------------------------------------------------------------- loading


def test_a_loaded_model_has_the_accuracy_of_the_result(run, model):
    splits = make_run(run.parent, host=HOST, name="other").context.load(
        kdcore.SourceSpec(kdcore.Spec("core/digits", {"test": 0.2}), monitor=0.1)
    )
    images = splits.test.images.float() / 255  # what torchvision's ToTensor gives
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == splits.test.labels).float().mean().item()
    result = json.loads((run / "result.json").read_bytes())
    assert accuracy == pytest.approx(result["student"]["test_accuracy"])
    assert not model.training


def test_a_loaded_network_has_the_files_weights(run, model):
    stored = load_file(run / "student.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.network.state_dict().items())
    assert set(model.network.taps) == {"pooled"}


def test_a_model_of_a_plugin_file_is_loaded_with_it(tmp_path):
    network = torch.nn.Linear(1, 1)
    card = {"format": 1, "model": "proofs/generator", "options": {}, "shape": [1, 8, 8], "classes": 10, "mean": [0.0]}
    path = tmp_path / "g.safetensors"
    path.write_bytes(save(network.state_dict(), {KEY: json.dumps({**card, "std": [1.0], "scale": 255})}))
    with pytest.raises(RecipeError, match="unknown model 'proofs/generator'"):
        kdcore.load_model(path)
    with pytest.raises(RecipeError, match="lacks"):  # found, and these are not its weights
        kdcore.load_model(path, plugin_files=[PROOFS])


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_of_a_run_is_compared_and_told(run, tmp_path, cli, name):
    suffix = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}[name]
    for member in ("student", "teacher"):
        done = cli("export", run, "--format", name, "--member", member, "--out", tmp_path / f"{member}{suffix}")
        assert done.code == 0, done.err
        assert f"{member}{suffix}: vision/" in done.out
        assert "float32 1x8x8 images of 10 classes, in 0..1" in done.out
        assert done.out.count("the same classes, logits at most") == 2
        assert "compared, 1 at once" in done.out
        assert "compared, 8 at once" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"student{suffix}", f"teacher{suffix}"]


@pytest.mark.parametrize("name", FORMATS[1:])
@pytest.mark.parametrize("model_name", ["resnet", "mlp"])
def test_readers_without_kdcore_get_the_same_logits_for_any_batch(tmp_path, name, model_name):
    path = untrained(tmp_path, model_name, {"size": 3})
    model = kdcore.load_model(path)
    exported(model, name, tmp_path / "out.pt2")
    read = reader(name, tmp_path / "out.pt2")
    for batch in (1, 2, 5, 33):
        images = torch.rand(batch, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(read(images), model(images), rtol=1e-4, atol=1e-4)


def untrained(folder, name, options, **changes):
    """A weights file of a model with initial weights, for 3x16x16 images of 7 classes; ``changes`` are of its card."""
    from kdcore.data import DataInfo

    entry = HOST.catalog.find("model", name)
    options = entry.check(options, "test")
    network = entry.load()(entry.options_class()(**options), DataInfo(tuple(changes.get("shape", (3, 16, 16))), 7))
    card = {"format": 1, "model": entry.full_name, "options": options, "shape": [3, 16, 16], "classes": 7, "scale": 255,
            "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 0.2], **changes}  # fmt: skip
    (folder / "model.safetensors").write_bytes(save(network.state_dict(), {KEY: json.dumps(card)}))
    return folder / "model.safetensors"


@pytest.mark.parametrize("name", FORMATS[1:])
def test_an_export_carries_the_card(run, model, tmp_path, name):
    exported(model, name, tmp_path / "out.pt2")
    if name == "torch-export":
        extra = {KEY: ""}
        torch.export.load(tmp_path / "out.pt2", extra_files=extra)
    else:
        import onnxruntime

        extra = onnxruntime.InferenceSession(tmp_path / "out.pt2").get_modelmeta().custom_metadata_map
    assert extra[KEY] == read_card(run / "student.safetensors").metadata[KEY]


def test_a_safetensors_export_is_the_delivered_file_and_can_be_exported(run, tmp_path, cli):
    assert cli("export", run, "--format", "safetensors", "--out", tmp_path / "a.safetensors").code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (run / "student.safetensors").read_bytes()
    assert cli("export", tmp_path / "a.safetensors", "--batch", 2).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt2", "a.safetensors"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_buffer_that_no_weights_file_holds_is_the_models_own(tmp_path, name):
    class Scaled(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

        def forward(self, x):
            return super().forward(x.flatten(1) * self.scale)

    card = Card(model="own/scaled", options={}, shape=(1, 2, 2), classes=2, mean=(0.0,), std=(1.0,), scale=1)
    exported(Classifier(Scaled(), card).eval(), name, tmp_path / "model")


@needs_onnx
def test_opset_18_is_an_option_of_onnx(model, tmp_path):
    import onnx

    exported(model, "onnx", tmp_path / "out.onnx", opset=18)
    assert onnx.load(tmp_path / "out.onnx").opset_import[0].version == 18


def test_onnx_without_its_packages_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"onnxruntime cannot be imported\. Write: pip install onnx onnxscript"):
        exported(model, "onnx", tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_images_of_a_set_that_is_no_uint8_are_taken_as_it_has_them(tmp_path):
    path = untrained(tmp_path, "mlp", {"size": 1}, scale=1, mean=[30.0, 0.0, -5.0], std=[9.0, 1.0, 2.0])
    model = kdcore.load_model(path)
    images = model.example(500)
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([30.0, 0.0, -5.0], abs=0.2)
    normal = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(model(images), model.network(normal), rtol=0.05, atol=0.05)


# ---------------------------------------------------------------- what is not kept

BROKEN = """
import copy, torch, kdcore

class Base:
    suffix = ".bin"
    def __init__(self, options): pass
    def export(self, module, images, path): path.write_bytes(b"new")
    def load(self, path, module): return lambda images: self.change(module(images), images)

class Noisy(Base):
    def change(self, logits, images): return logits + 0.01 * (1 + logits.abs().max())

class Nan(Base):
    def change(self, logits, images): return logits * float("nan")

class Small(Base):
    def change(self, logits, images): return logits[:1, :3]

class OneBatch(Base):
    def change(self, logits, images): return logits if len(images) > 1 else logits + 1

class Raising(Base):
    def export(self, module, images, path): path.write_bytes(b"half"); raise ValueError("no")

class Lazy(Base):
    def export(self, module, images, path): pass
    def load(self, path, module): return module

class Nothing:
    suffix = ".bin"

class Good(Base):
    class Options(kdcore.Options):
        level: int = 1
    def change(self, logits, images): return logits

@kdcore.hookimpl
def kdcore_register(registry):
    for kind in (Noisy, Nan, Small, OneBatch, Raising, Lazy, Nothing, Good):
        registry.exporter(kind.__name__.lower(), kind)
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("noisy", "exporter 'bad/noisy': the file gives other logits: 0."),
        ("nan", "the file gives other logits: nan away for 1 images"),
        ("small", "the file gives torch.Size([1, 3]) for 1 images, not (1, 10)"),
        ("onebatch", "the file gives other logits: 1 away for 1 images"),
        ("raising", "ValueError: no"),
        ("lazy", "No such file or directory"),
        ("nothing", "exporter 'bad/nothing' has no 'export' and no 'load'"),
    ],
)
def test_an_export_that_is_not_the_model_leaves_the_file_that_was_there(run, plugin_file, cli, tmp_path, name, says):
    file, out = plugin_file("bad", BROKEN), tmp_path / "out.bin"
    out.write_bytes(b"old")
    done = cli("export", run, "--format", name, "--plugin-file", file, "--out", out)
    assert done.code == (4 if name == "lazy" else 3), done.err
    assert says in done.err
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["bad.py", "out.bin"]


def test_a_plugins_exporter_is_a_format_with_options(run, plugin_file, cli, tmp_path):
    file = plugin_file("bad", BROKEN)
    done = cli("export", run, "--format", "good", "--plugin-file", file, "--out", tmp_path / "out", "--set", "level=3")
    assert (done.code, (tmp_path / "out").read_bytes()) == (0, b"new"), done.err
    done = cli("export", run, "--format", "good", "--plugin-file", file, "--set", "levle=3")
    assert "--set.levle: unknown key. Did you mean 'level'?" in done.err


def test_a_full_disk_leaves_no_export(model, tmp_path):
    for first in (1, 2, 3):  # fsync of the file twice, rename
        with failing_disk(first=first, length=10**6), pytest.raises(StorageError, match="No space left"):
            exported(model, "safetensors", tmp_path / "a.safetensors")
        assert list(tmp_path.iterdir()) == []


def test_a_model_that_branches_on_its_input_says_so(model, tmp_path):
    class Branching(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :10] * (2 if images.sum() > 0 else 1)

    branching = kdcore.Classifier(Branching(), model.card).eval()
    with pytest.raises(PluginError, match=r"model 'vision/mlp': torch\.export cannot trace it: .*must not branch"):
        exported(branching, "torch-export", tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_are_not_exported(model, tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    torch.nn.init.constant_(network[1].weight, float("inf"))
    with pytest.raises(NumericError, match="are not finite"):
        exported(kdcore.Classifier(network, model.card).eval(), "safetensors", tmp_path / "out")


def test_a_teacher_that_is_not_stored_any_more_is_missed(run, cli, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("run.json", "result.json"):
        text = (run / name).read_text().replace(str(run.parent / "store"), str(tmp_path / "store"))
        (tmp_path / "run" / name).write_text(text)
    done = cli("export", "run", "--member", "teacher")
    assert (done.code, "the teacher is not stored any more. Run the recipe again." in done.err) == (4, True)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--format", "onx"], 2, "--format: unknown exporter 'onx'. Did you mean 'onnx'?"),
        (["--member", "control"], 2, "--member: the run has no 'control'. Write student or teacher."),
        (["--format", "safetensors"], 2, "is what is exported. Write --out with another name."),
    ],
)
def test_wrong_words_are_refused(run, cli, arguments, code, says):
    done = cli("export", run, *arguments)
    assert done.code == code
    assert says in done.err


def test_what_is_no_run_and_no_weights_file_is_refused(run, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    assert "run.json: no such file. Give the folder of a run" in cli("export", tmp_path / "empty").err
    assert "is no safetensors file" in cli("export", tmp_path / "text").err
    assert "No such file" in cli("export", tmp_path / "nothing").err


def test_the_tolerance_grows_with_the_logits(model, tmp_path):
    first, second = exported(model, "safetensors", tmp_path / "out")
    assert isinstance(first, Match)
    assert (first.batch, second.batch, first.difference) == (1, 4, 0.0)
    with torch.no_grad():
        assert second.tolerance == pytest.approx(1e-4 * max(1, model(model.example(4)).abs().max().item()))


def test_the_format_is_documented():
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text()
    for word in (*Card.model_fields, *(entry.name for entry in HOST.catalog.all("exporter"))):
        assert f"`{word}`" in text, word


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS[1:])
@pytest.mark.parametrize(
    "model_name",
    ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "mnasnet0_5", "regnet_x_400mf", "shufflenet_v2_x0_5",
     "squeezenet1_0", "swin_t", "vit_b_16"],
)  # fmt: skip
def test_every_family_of_torchvision_can_be_exported(tmp_path, name, model_name):
    model = kdcore.load_model(untrained(tmp_path, model_name, {}, shape=[3, 64, 64]))
    first, second = exported(model, name, tmp_path / "out", batch=3)
    assert (first.batch, second.batch) == (1, 3)
