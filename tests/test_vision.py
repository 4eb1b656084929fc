"""The vision plugin: sizes, shapes, taps and reproducible weights."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import kdcore_vision
import pytest
import torch
import torchvision
from kdcore_vision import families, torchvision_models
from kdcore_vision.names import CIFAR, TORCHVISION
from kdcore_vision.options import CnnOptions, MlpOptions, ResnetOptions, TorchvisionOptions
from torch import nn

from kdcore import DataInfo
from kdcore.errors import DataError
from kdcore.origin import Origin
from kdcore.registry import Entry, Registrar

GREY, RGB = DataInfo((1, 8, 8), 10), DataInfo((3, 32, 32), 100)
BUILD = {
    "mlp": (families.mlp, MlpOptions),
    "cnn": (families.cnn, CnnOptions),
    "resnet": (families.resnet, ResnetOptions),
}
FAMILIES = sorted(BUILD)
SMALL = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf", "mnasnet0_5"]
# one of each family; regnet does not build on the meta device and is among SMALL
# fmt: off
FAMILY_HEADS = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "mnasnet1_0",
    "mobilenet_v2", "mobilenet_v3_large", "resnet50", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_0",
    "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2",
]
# fmt: on


def build(family: str, size: int, data: DataInfo = GREY, **options) -> nn.Module:
    make, options_class = BUILD[family]
    return make(options_class(size=size, **options), data)


def build_torchvision(name: str, data: DataInfo, **options) -> nn.Module:
    return getattr(torchvision_models, f"build_{name}")(TorchvisionOptions(**options), data)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def features(model: nn.Module, data: DataInfo, batch: int = 2) -> dict[str, tuple[int, ...]]:
    """Shape of the logits and of each tap."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, path in model.taps.items():
        hook = lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)})  # noqa: E731
        model.get_submodule(path).register_forward_hook(hook)
    return {"logits": tuple(model(torch.randn(batch, *data.shape)).shape), **shapes}


def tapped(model: nn.Module, of=lambda tensor: tensor) -> dict[str, torch.Tensor]:
    """Filled when the model runs, with ``of(feature)`` of each tap."""
    taps: dict[str, torch.Tensor] = {}
    for name, path in model.taps.items():
        model.get_submodule(path).register_forward_hook(lambda _, __, out, name=name: taps.update({name: of(out)}))
    return taps


def entries() -> dict[str, Entry]:
    registrar = Registrar(Origin("vision"))
    kdcore_vision.kdcore_register(registrar)
    assert {entry.kind for entry in registrar.entries} == {"model"}
    return {entry.name: entry for entry in registrar.entries}


# ---------------------------------------------------------------- families


def layers(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 10, 12])
@pytest.mark.parametrize("data", [GREY, RGB])
def test_size_is_the_number_of_layers_or_blocks(size: int, data: DataInfo):
    assert len(layers(build("mlp", size, data), nn.Linear)) == size
    assert len(layers(build("cnn", size, data), nn.Conv2d)) == size
    assert len(layers(build("resnet", size, data), families.BasicBlock)) == size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("data", [GREY, RGB, DataInfo((2, 3, 5), 4), DataInfo((1, 1, 1), 2)])
def test_logits_have_one_column_a_class_for_any_image(family: str, data: DataInfo):
    for size in (1, 2, 3, 5):
        shapes = features(build(family, size, data), data)
        assert shapes["logits"] == (2, data.classes)
        assert len(shapes["pooled"]) == 2


def test_parameter_counts_are_those_on_paper():
    assert parameters(build("mlp", 2, DataInfo((1, 28, 28), 10))) == 784 * 64 + 64 + 64 * 10 + 10
    assert parameters(build("mlp", 1)) == 64 * 10 + 10
    convolutions = 9 * (1 * 32 + 32 * 64 + 64 * 128)
    assert parameters(build("cnn", 3)) == convolutions + 2 * (32 + 64 + 128) + 128 * 10 + 10
    # He et al. (2016): 0.27 M for ResNet-20, which is 9 blocks; projections add 2,560 weights and 192 of batch norm
    plain = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameters(build("resnet", 9, DataInfo((3, 32, 32), 10))) == plain + norms + projections + 64 * 10 + 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_larger_size_has_more_parameters(family: str):
    counts = [parameters(build(family, size, RGB)) for size in (3, 4, 6, 8, 10, 12)]
    assert counts == sorted(set(counts))


def test_stages_share_the_layers_and_vanish_when_empty():
    assert [families.groups(n) for n in (0, 1, 2, 3, 4, 5, 12)] == [
        [], [1], [1, 1], [1, 1, 1], [2, 1, 1], [2, 2, 1], [4, 4, 4],
    ]  # fmt: skip
    for family in ("cnn", "resnet"):
        assert list(build(family, 2).taps) == ["stage1", "stage2", "pooled"]
        assert list(build(family, 5).taps) == ["stage1", "stage2", "stage3", "pooled"]
    assert list(build("mlp", 1).taps) == ["pooled"]
    assert list(build("mlp", 4).taps) == ["stage1", "stage2", "stage3", "pooled"]


def test_feature_maps_halve_between_stages_while_they_are_large_enough():
    cnn, resnet = features(build("cnn", 6, RGB), RGB), features(build("resnet", 6, RGB), RGB)
    assert [cnn[f"stage{i}"] for i in (1, 2, 3)] == [(2, 32, 32, 32), (2, 64, 16, 16), (2, 128, 8, 8)]
    assert [resnet[f"stage{i}"] for i in (1, 2, 3)] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    tiny = DataInfo((1, 4, 4), 3)
    assert [features(build("cnn", 3, tiny), tiny)[f"stage{i}"][2:] for i in (1, 2, 3)] == [(4, 4), (2, 2), (2, 2)]


def test_width_scales_the_channels():
    assert features(build("cnn", 3, width=0.5), GREY)["pooled"] == (2, 64)
    assert features(build("resnet", 3, width=2), GREY)["pooled"] == (2, 128)
    assert features(build("mlp", 3, width=20), GREY)["stage1"] == (2, 20)


def test_mlp_weights_are_he_normal_and_biases_zero():
    torch.manual_seed(0)
    first = layers(build("mlp", 3, RGB), nn.Linear)[0]
    assert float(first.weight.detach().std()) == pytest.approx((2 / 3072) ** 0.5, rel=0.02)
    assert not first.bias.any()


def test_a_deep_mlp_passes_a_signal_at_initialisation():
    torch.manual_seed(0)
    model = build("mlp", 10)
    assert model(torch.randn(256, *GREY.shape)).std(0).min() > 0.1


# ---------------------------------------------------------------- torchvision


def test_every_name_exists_in_torchvision_and_only_auxiliary_ones_are_left_out():
    known = set(torchvision.models.list_models(module=torchvision.models))
    assert known - set(TORCHVISION) == {"googlenet", "inception_v3"}
    assert not set(TORCHVISION) - known
    assert len(TORCHVISION) == len(set(TORCHVISION))


def test_every_name_resolves_to_a_builder():
    for name, entry in entries().items():
        assert callable(entry.load()), name
    with pytest.raises(AttributeError, match="build_resnet19"):
        _ = torchvision_models.build_resnet19


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_train_on_grey_and_colour(name: str, channels: int):
    data = DataInfo((channels, 32, 32), 7)
    model = build_torchvision(name, data)
    assert model.training
    shapes = features(model, data)
    assert shapes["logits"] == (2, 7)
    assert set(model.taps) == set(shapes) - {"logits"}
    model(torch.randn(2, *data.shape)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", FAMILY_HEADS)
def test_taps_of_every_family_resolve_and_pooled_is_a_vector(name: str):
    data = DataInfo((3, 224, 224), 7)
    with torch.device("meta"):
        shapes = features(torchvision_models.construct(name, TorchvisionOptions(), data), data)
    assert shapes.pop("logits") == (2, 7)
    if not name.startswith("squeezenet"):
        assert len(shapes["pooled"]) == 2


TAPPED = ["resnet18", "resnext50_32x4d", "regnet_y_400mf", "alexnet", "swin_t", "mnasnet0_5"]


@pytest.mark.parametrize("name", TAPPED)
def test_a_torchvision_checkpoint_fits_and_taps_change_no_logit(name: str):
    theirs = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    ours = build_torchvision(name, DataInfo((3, 64, 64), 7)).eval()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    taps = tapped(ours)
    assert torch.equal(ours(images), theirs(images))
    for tap in ours.taps:
        if tap.endswith("_pre"):
            assert taps[tap].min() < 0
            assert torch.equal(taps[tap.removesuffix("_pre")], taps[tap].relu()), tap


@pytest.mark.parametrize("name", [*SMALL, "alexnet", "mobilenet_v2", "densenet121", "swin_t"])
def test_no_layer_overwrites_what_is_tapped(name: str):
    model = build_torchvision(name, DataInfo((3, 64, 64), 7)).eval()
    taps, copies = tapped(model), tapped(model, torch.clone)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert taps.keys() == copies.keys() == model.taps.keys()
    assert all(torch.equal(taps[tap], copies[tap]) for tap in taps)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "vgg11_bn"])
def test_norms_are_the_last_thing_before_the_activation(name: str):
    with torch.device("meta"):
        model = torchvision_models.construct(name, TorchvisionOptions(), DataInfo((3, 64, 64), 7))
        shapes = features(model, DataInfo((3, 64, 64), 7))
    assert set(model.norms) == {tap for tap in model.taps if tap.endswith("_pre")} != set()
    for tap, path in model.norms.items():
        norm = model.get_submodule(path)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_features == shapes[tap][1]


def test_maps_of_swin_have_their_channels_first_and_tokens_of_a_vit_last():
    data = DataInfo((3, 64, 64), 7)
    with torch.device("meta"):
        swin = features(torchvision_models.construct("swin_t", TorchvisionOptions(), data), data)
        vit = features(torchvision_models.construct("vit_b_32", TorchvisionOptions(), data), data)
    assert [swin[f"stage{i}"] for i in (1, 4)] == [(2, 96, 16, 16), (2, 768, 2, 2)]
    assert [vit[f"stage{i}"] for i in (1, 2, 3, 4)] == [(2, 5, 768)] * 4


def test_grey_images_get_three_equal_channels():
    torch.manual_seed(0)
    grey = build_torchvision("resnet18", DataInfo((1, 32, 32), 7)).eval()
    torch.manual_seed(0)
    colour = build_torchvision("resnet18", DataInfo((3, 32, 32), 7)).eval()
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(images), colour(images.repeat(1, 3, 1, 1)))


def test_dropout_is_off_unless_asked_for():
    data = DataInfo((3, 32, 32), 7)
    random = (nn.Dropout, torchvision.ops.StochasticDepth)
    for dropout in (False, True):
        with torch.device("meta"):
            model = torchvision_models.construct("efficientnet_b0", TorchvisionOptions(dropout=dropout), data)
        assert any(module.p > 0 for module in model.modules() if isinstance(module, random)) == dropout


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("alexnet", (1, 32, 32), "'alexnet': it cannot take 1x32x32 images: .*too small"),
        ("maxvit_t", (3, 32, 32), "not divisible by partition size"),
        ("vit_b_16", (3, 28, 28), "indivisible by patch size"),
        ("vit_b_32", (3, 32, 64), "cannot take 3x32x64 images"),
        ("resnet18", (4, 32, 32), "4 channels. It takes 1 or 3"),
    ],
)
def test_an_image_that_does_not_fit_is_a_data_error(name: str, shape: tuple[int, int, int], message: str):
    with pytest.raises(DataError, match=message):
        build_torchvision(name, DataInfo(shape, 10))


def test_checking_the_shape_leaves_batch_norm_alone():
    model = build_torchvision("resnet18", DataInfo((3, 32, 32), 7))
    assert int(model.bn1.num_batches_tracked) == 0
    assert not model.bn1.running_mean.any()


# ---------------------------------------------------------------- all models


@pytest.mark.parametrize("name", [*FAMILIES, "resnet18", "mobilenet_v3_small"])
def test_equal_seeds_give_equal_weights(name: str):
    def make(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = build(name, 4, RGB) if name in BUILD else build_torchvision(name, RGB)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = make(0)
    assert torch.equal(make(0), first)
    assert not torch.equal(make(1), first)


def test_the_check_of_shapes_draws_no_random_numbers():
    torch.manual_seed(0)
    torchvision_models.construct("resnet18", TorchvisionOptions(), RGB)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    build_torchvision("resnet18", RGB)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_can_be_saved_and_loaded(family: str):
    model, other = build(family, 4), build(family, 4)
    other.load_state_dict(model.state_dict())
    images = torch.randn(3, *GREY.shape)
    assert torch.equal(model.eval()(images), other.eval()(images))


# ---------------------------------------------------------------- the plugin


def test_plugin_registers_every_model_with_options():
    found = entries()
    assert set(found) == {*FAMILIES, *CIFAR, *TORCHVISION, "timm"}
    assert found["mlp"].check({"size": 3}, "student") == {"size": 3, "width": 64}
    assert found["resnet18"].check({}, "teacher") == {"dropout": False}
    assert found["cnn"].load() is families.cnn


def test_plugin_registers_and_checks_options_without_torch():
    code = (
        "import sys, kdcore_vision\n"
        "from kdcore.origin import Origin\nfrom kdcore.registry import Registrar\n"
        "registrar = Registrar(Origin('vision'))\n"
        "kdcore_vision.kdcore_register(registrar)\n"
        "[entry.options_class() for entry in registrar.entries]\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plugin_uses_only_names_that_kdcore_exports():
    import kdcore

    for file in Path(kdcore_vision.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kdcore":
                assert node.module == "kdcore"
                assert {alias.name for alias in node.names} <= set(kdcore.__all__)
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("kdcore.") for alias in node.names)
