"""Models of timm, where it is installed, and what is said where it is not."""

from __future__ import annotations

import sys

import pytest
import torch
from kdcore_vision import timm_models
from kdcore_vision.options import TimmOptions
from test_vision import features, tapped
from torch import nn

from kdcore import DataInfo
from kdcore.errors import DataError, PluginError, RecipeError
from kdcore.testing import Subject, parametrize_with_checks, verdicts

DATA = DataInfo((2, 64, 64), 7)
MODEL = "kdcore_vision.timm_models:build"
NAMES = ["test_resnet", "test_vit", "test_convnext", "test_mambaout"]
SUBJECTS = [Subject("model", name, MODEL, TimmOptions(name=name)) for name in NAMES]


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def build(name: str, data: DataInfo = DATA) -> nn.Module:
    return timm_models.build(TimmOptions(name=name), data)


def test_without_timm_a_person_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PluginError, match=r"model 'timm': timm cannot be imported\. Write: pip install timm"):
        build("test_resnet")
    found = list(verdicts(SUBJECTS[0]))
    assert not [verdict for verdict in found if verdict.state == "failed"]
    assert "timm cannot be imported" in found[-1].reason


@pytest.mark.parametrize("name", NAMES)
def test_models_fit_the_data_and_have_the_taps_that_timm_lists(timm, name: str):
    model = build(name)
    shapes = features(model, DATA)
    assert shapes.pop("logits") == (2, 7)
    assert len(shapes.pop("pooled")) == 2
    assert list(shapes) == [f"stage{i}" for i in range(1, len(shapes) + 1)]
    for feature, shape in zip(model.feature_info, shapes.values(), strict=True):
        assert feature["num_chs"] == (shape[-1] if len(shape) == 3 else shape[1])


def test_logits_and_parameters_are_timms(timm):
    for name in NAMES:
        size = {"img_size": (64, 64)} if name == "test_vit" else {}
        theirs, ours = timm.create_model(name, num_classes=7, in_chans=2, **size).eval(), build(name).eval()
        ours.load_state_dict(theirs.state_dict())
        tapped(ours)
        images = torch.randn(2, *DATA.shape)
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_resnt", "timm has no model 'test_resnt'. Did you mean 'test_resnet'"),
        ("hf-hub:somebody/something", "timm.list_models"),
    ],
)
def test_a_name_that_timm_does_not_have_is_a_recipe_error_and_looked_up_nowhere(timm, name: str, message: str):
    with pytest.raises(RecipeError, match=message):
        build(name)


def test_a_feature_that_is_no_tensor_is_no_tap(timm):
    data = DataInfo((3, 224, 224), 7)
    for name in ("coat_tiny", "hrnet_w18_small", "selecsls42b"):
        with torch.device("meta"):
            model = build(name, data)
            found = features(model, data)
        assert set(found) == {"logits", *model.taps}
        assert len(model.taps) - 1 < len(model.feature_info)


def test_a_model_without_a_classifier_is_a_recipe_error(timm, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: nn.Linear(1, 1))
    with pytest.raises(RecipeError, match="'test_resnet' is no classifier"):
        build("test_resnet")


def test_an_image_that_does_not_fit_is_a_data_error(timm):
    with pytest.raises(DataError, match="'test_vit': it cannot take 2x8x8 images"):
        build("test_vit", DataInfo((2, 8, 8), 7))


@parametrize_with_checks(*SUBJECTS)
def test_models_of_timm_conform(timm, check):
    check()
