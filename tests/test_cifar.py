"""The CIFAR zoo: the field's parameter counts, names, initial weights and features, for images of any size."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F
from kdcore_vision import cifar
from kdcore_vision.cifar_shuffle import shuffled
from kdcore_vision.names import CIFAR
from kdcore_vision.options import CifarOptions
from test_vision import features, parameters, tapped
from torch import Tensor, nn

from kdcore import DataInfo
from kdcore.errors import DataError
from kdcore.testing import parametrize_with_checks, subjects_of

# parameters at 100 classes, and a digest of the names and shapes of RepDistiller's state dict (commit b84f547)
PUBLISHED = {
    "cifar_resnet8": (83_892, "5449ecb61c0b"),
    "cifar_resnet14": (181_108, "e206008031b5"),
    "cifar_resnet20": (278_324, "6f54e389c35c"),
    "cifar_resnet32": (472_756, "9a7e2a11fa94"),
    "cifar_resnet44": (667_188, "caefd48710fe"),
    "cifar_resnet56": (861_620, "470885c26e17"),
    "cifar_resnet110": (1_736_564, "7e524b233505"),
    "cifar_resnet8x4": (1_233_540, "6a4fa0192e11"),
    "cifar_resnet32x4": (7_433_860, "250044a29347"),
    "cifar_resnet50": (23_705_252, "699fe537c132"),
    "cifar_wrn_16_1": (180_916, "72def0ef8fdf"),
    "cifar_wrn_16_2": (703_284, "264bf5a37859"),
    "cifar_wrn_40_1": (569_780, "0aa607a5c1b6"),
    "cifar_wrn_40_2": (2_255_156, "adf0a10c7ead"),
    "cifar_vgg8": (3_965_028, "bff82c0f138a"),
    "cifar_vgg11": (9_277_284, "64b2552e8868"),
    "cifar_vgg13": (9_462_180, "af06ff07f75e"),
    "cifar_vgg16": (14_774_436, "510623fbedb9"),
    "cifar_vgg19": (20_086_692, "46f8e0c0e44e"),
    "cifar_mobilenetv2": (812_836, "cf2fc083e7ae"),
    "cifar_shufflenetv1": (949_258, "b19c4d818f21"),
    "cifar_shufflenetv2": (1_355_528, "8f44a58a43a9"),
}
# widths and sides of the stem and of each stage for 32x32 images, and the width of pooled
FEATURES = {
    "cifar_resnet8": ((16, 16, 32, 64), (32, 32, 16, 8), 64),
    "cifar_resnet32x4": ((32, 64, 128, 256), (32, 32, 16, 8), 256),
    "cifar_resnet50": ((64, 256, 512, 1024, 2048), (32, 32, 16, 8, 4), 2048),
    "cifar_wrn_40_2": ((16, 32, 64, 128), (32, 32, 16, 8), 128),
    "cifar_vgg8": ((64, 128, 256, 512, 512), (32, 16, 8, 4, 4), 512),
    "cifar_vgg19": ((64, 128, 256, 512, 512), (32, 16, 8, 4, 4), 512),
    "cifar_mobilenetv2": ((16, 12, 16, 48, 160), (16, 16, 8, 4, 2), 1280),
    "cifar_shufflenetv1": ((24, 240, 480, 960), (32, 16, 8, 4), 960),
    "cifar_shufflenetv2": ((24, 116, 232, 464), (32, 16, 8, 4), 1024),
}
SMALL = [
    "cifar_resnet8",
    "cifar_wrn_16_1",
    "cifar_vgg8",
    "cifar_mobilenetv2",
    "cifar_shufflenetv1",
    "cifar_shufflenetv2",
]
HEADS = [*SMALL, "cifar_resnet50"]
RGB = DataInfo((3, 32, 32), 100)


def build(name: str, data: DataInfo = RGB) -> nn.Module:
    return getattr(cifar, f"build_{name}")(CifarOptions(), data)


def shape_only(name: str, data: DataInfo = RGB) -> nn.Module:
    with torch.device("meta"):
        return build(name, data)


def shapes_of(name: str, data: DataInfo = RGB) -> dict[str, tuple[int, ...]]:
    """Shape of the logits and of each tap, without arithmetic."""
    with torch.device("meta"):
        return features(build(name, data), data)


def run(name: str, side: int = 16) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with other norms than at the start, in evaluation mode, and its taps of one batch."""
    torch.manual_seed(0)
    model = build(name, DataInfo((3, side, side), 5)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model, taps_of(model, torch.randn(2, 3, side, side))


def taps_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    taps = tapped(model)
    with torch.no_grad():
        model(images)
    return dict(taps)


def test_the_zoo_is_the_published_one():
    assert set(CIFAR) == set(PUBLISHED) == set(cifar.BUILDERS)
    assert len(CIFAR) == len(PUBLISHED)
    with pytest.raises(AttributeError, match="build_cifar_resnet9"):
        _ = cifar.build_cifar_resnet9


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_names_and_shapes_of_parameters_are_the_published_ones(name: str):
    model = shape_only(name)
    names = "\n".join(f"{key} {list(value.shape)}" for key, value in model.state_dict().items())
    assert (parameters(model), hashlib.sha256(names.encode()).hexdigest()[:12]) == PUBLISHED[name]


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("name", FEATURES)
def test_taps_are_alike_in_every_family(name: str):
    widths, sides, pooled = FEATURES[name]
    found = shapes_of(name)
    names = ["stem", *(f"stage{i}" for i in range(1, len(widths)))]
    for tap, width, side in zip(names, widths, sides, strict=True):
        assert found.pop(tap) == (2, width, side, side)
        assert tap == "stem" or found.pop(f"{tap}_pre") == (2, width, side, side)
    assert found == {"pooled": (2, pooled), "logits": (2, 100)}


@pytest.mark.parametrize("name", CIFAR)
def test_every_model_has_stages_in_order_and_all_its_taps(name: str):
    model = shape_only(name)
    stages = [tap for tap in model.taps if tap.startswith("stage")]
    assert stages == [f"stage{i + 1}{end}" for i in range(len(stages) // 2) for end in ("_pre", "")]
    assert set(model.taps) == {"stem", *stages, "pooled"}
    assert set(shapes_of(name)) == {*model.taps, "logits"}


@pytest.mark.parametrize(
    "name", ["cifar_resnet8", "cifar_resnet8x4", "cifar_resnet50", "cifar_vgg8", "cifar_shufflenetv1"]
)
def test_a_stage_is_the_relu_of_what_comes_before_it(name: str):
    model, taps = run(name)
    for stage in range(1, len(model.norms) + 1):
        assert taps[f"stage{stage}_pre"].min() < 0
        assert torch.equal(taps[f"stage{stage}"], F.relu(taps[f"stage{stage}_pre"]))


def test_a_stage_of_shufflenetv2_is_shuffled_after_its_relu():
    _, taps = run("cifar_shufflenetv2")
    for stage in (1, 2, 3):
        before = taps[f"stage{stage}_pre"]
        assert torch.equal(taps[f"stage{stage}"], shuffled(F.relu(before), 2))
        passed, changed = before.chunk(2, 1)
        assert passed.min() >= 0 > changed.min()


def test_a_stage_of_a_wide_resnet_is_a_sum_and_the_next_batch_norm_comes_before_the_activation():
    model, taps = run("cifar_wrn_16_2")
    for stage in (1, 2, 3):
        norm = model.get_submodule(model.norms[f"stage{stage}_pre"])
        assert taps[f"stage{stage}"].min() < 0
        assert torch.equal(taps[f"stage{stage}_pre"], norm(taps[f"stage{stage}"]))
    assert torch.equal(taps["pooled"], F.relu(taps["stage3_pre"]).mean((2, 3)))


def test_a_stage_of_mobilenetv2_has_no_activation():
    _, taps = run("cifar_mobilenetv2")
    assert all(torch.equal(taps[f"stage{i}"], taps[f"stage{i}_pre"]) for i in (1, 2, 3, 4))
    assert all(taps[f"stage{i}"].min() < 0 for i in (1, 2, 3, 4))


@pytest.mark.parametrize("name", [name for name in HEADS if name != "cifar_shufflenetv2"])
def test_norms_come_last_before_the_activation(name: str):
    """A bias that is larger by 1 makes the feature larger by 1, everywhere."""
    model, _ = run(name)
    images = torch.randn(2, 3, 16, 16)
    assert set(model.norms) == {tap for tap in model.taps if tap.endswith("_pre")}
    for tap, path in model.norms.items():
        bias = model.get_submodule(path).bias
        nn.init.constant_(bias, 0)
        low = taps_of(model, images)[tap]
        nn.init.constant_(bias, 1)
        torch.testing.assert_close(taps_of(model, images)[tap], low + 1, rtol=1e-4, atol=1e-4)
        assert low.shape[1] == len(bias)


def test_shufflenetv2_names_no_norms():
    assert not hasattr(shape_only("cifar_shufflenetv2"), "norms")


@pytest.mark.parametrize("name", HEADS)
def test_the_head_reads_pooled_and_no_layer_overwrites_a_tap(name: str):
    torch.manual_seed(0)
    model = build(name, DataInfo((3, 16, 16), 5)).eval()
    taps, copies = tapped(model), tapped(model, torch.clone)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = model(images)
        *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
        torch.testing.assert_close(head(taps["pooled"]), logits)
    assert all(torch.equal(taps[tap], copies[tap]) for tap in model.taps)


# ---------------------------------------------------------------- initial weights


def weights(name: str, kind: type[nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [module for module in build(name).modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_wrn_16_2", "cifar_vgg8", "cifar_mobilenetv2"])
def test_convolutions_are_he_normal_by_fan_out_without_bias(name: str):
    for convolution in weights(name, nn.Conv2d):
        spread = (2 / (convolution.kernel_size[0] ** 2 * convolution.out_channels)) ** 0.5
        if convolution.weight.numel() > 4000:
            assert float(convolution.weight.detach().std()) == pytest.approx(spread, rel=0.05)
        assert convolution.bias is None or not convolution.bias.any()


@pytest.mark.parametrize(
    ("name", "spread"), [("cifar_vgg8", 0.01), ("cifar_mobilenetv2", 0.01), ("cifar_wrn_16_2", None)]
)
def test_heads_start_as_published(name: str, spread: float | None):
    (head,) = weights(name, nn.Linear)
    assert not head.bias.any()
    expected = spread or (1 / (3 * head.in_features)) ** 0.5  # torch's own: uniform within 1 / sqrt(fan-in)
    assert float(head.weight.detach().std()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["cifar_shufflenetv1", "cifar_shufflenetv2"])
def test_shufflenets_start_as_torch_draws_them(name: str):
    largest = max(weights(name, nn.Conv2d), key=lambda module: module.weight.numel())
    bound = largest.weight[0].numel() ** -0.5
    assert float(largest.weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)


# ---------------------------------------------------------------- any image, any mode


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 21), (4, 28, 28)])
def test_images_of_any_size_from_8_on(name: str, shape: tuple[int, int, int]):
    model = build(name, DataInfo(shape, 5))
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


def test_vgg_refuses_images_of_which_nothing_is_left():
    with pytest.raises(DataError, match=r"images are 7x32: .* Use images of 8x8 or more"):
        shape_only("cifar_vgg8", DataInfo((3, 7, 32), 5))


def test_vgg_halves_large_images_once_more():
    for side, last in ((32, 4), (63, 7), (64, 4), (96, 6)):
        data = DataInfo((3, side, side), 5)
        assert shapes_of("cifar_vgg8", data)["stage4"][2:] == (last, last)


@pytest.mark.parametrize("name", HEADS)
def test_models_take_channels_last(name: str):
    torch.manual_seed(0)
    model = build(name, DataInfo((3, 8, 8), 5)).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        found = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def compiles_into_one_graph(name: str) -> None:
    model = build(name, DataInfo((3, 8, 8), 5))
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="eager")(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_wrn_16_1", "cifar_vgg8"])
def test_models_compile_into_one_graph(name: str):
    compiles_into_one_graph(name)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name for name in CIFAR if name not in ("cifar_resnet8", "cifar_wrn_16_1", "cifar_vgg8")]
)
def test_the_whole_zoo_compiles_into_one_graph(name: str):
    compiles_into_one_graph(name)


@pytest.mark.parametrize("name", CIFAR)
def test_no_layer_has_a_gradient_that_is_not_deterministic(name: str):
    kinds = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.Dropout)
    assert not [module for module in shape_only(name).modules() if isinstance(module, kinds)]


ZOO = {subject.name: subject for subject in subjects_of("vision") if subject.name in CIFAR}


@parametrize_with_checks(*(ZOO[name] for name in SMALL))
def test_each_family_conforms(check):
    check()


@pytest.mark.long
@parametrize_with_checks(*(ZOO[name] for name in CIFAR if name not in SMALL))
def test_the_whole_zoo_conforms(check):
    check()
