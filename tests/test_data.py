"""Data: what is checked, what is split, and what a batch depends on."""

from __future__ import annotations

import hashlib
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from kdcore.data import Batch, DataInfo, Dataset, Random, SourceContext, Split, Splits, load_splits
from kdcore.data.augment import Flip, Shift, flip, shift
from kdcore.data.options import DigitsOptions, ShiftOptions, SyntheticOptions, TorchvisionOptions
from kdcore.data.sets import cifar10, cifar100, digits, mnist, svhn, synthetic
from kdcore.data.source import EpochSource, eval_batches
from kdcore.data.splits import statistics, stratified
from kdcore.errors import DataError
from kdcore.options import Options

CPU = torch.device("cpu")
SHIFT = partial(shift, options=ShiftOptions(pixels=2))
FLIP = partial(flip, options=Options())
MOVED, MIRRORED = Shift(ShiftOptions(pixels=2)), Flip(Options())


def make_split(samples: int = 40, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Split:
    """Distinct random images [samples, 2, 6, 5] of 4 classes in turn."""
    images = torch.randint(256, (samples, 2, 6, 5), generator=torch.Generator().manual_seed(seed))
    return Split(images.to(dtype), torch.arange(samples) % 4)


def load(train: Split | None = None, test: Split | None = None, classes: int = 4, monitor: float = 0.3, seed: int = 0):
    train = make_split() if train is None else train
    test = make_split(12, seed=1) if test is None else test
    data = Dataset(train, test, classes)
    return load_splits(lambda _: data, None, monitor=monitor, split_seed=seed, name="mine")


def make_source(splits=None, seed=0, batch_size=8, drop_last=False, transforms=()):
    context = SourceContext((splits or load()).for_training, seed, batch_size, drop_last, tuple(transforms), CPU)
    return EpochSource(Options(), context)


def same(a: Batch, b: Batch) -> bool:
    pairs = ((a.inputs, b.inputs), (a.target, b.target), (a.index, b.index))
    return all(torch.equal(x, y) for x, y in pairs) and a.epoch == b.epoch


# ---------------------------------------------------------------- checks


def with_label(value: int) -> Split:
    split = make_split()
    split.labels[7] = value
    return split


def with_pixel(value: float) -> Split:
    split = make_split(dtype=torch.float32)
    split.images[5, 1, 2, 3] = value
    return split


GOOD = make_split()
BAD = {
    "negative label": (with_label(-1), "train split: sample 7 has label -1 .* from 0 to 3"),
    "label too large": (with_label(4), "train split: sample 7 has label 4 .* from 0 to 3"),
    "float labels": (Split(GOOD.images, GOOD.labels.float()), "train split: labels are torch.float32, not integers"),
    "bool labels": (Split(GOOD.images, GOOD.labels > 1), "train split: labels are torch.bool"),
    "one-hot labels": (
        Split(GOOD.images, torch.eye(4).long()[GOOD.labels]),
        r"train split: labels have .*40, 4.*one-hot",
    ),
    "missing label": (Split(GOOD.images, GOOD.labels[:-1]), "train split: 40 images but 39 labels: sample 39"),
    "missing image": (Split(GOOD.images[:-2], GOOD.labels), "train split: 38 images but 40 labels: sample 38"),
    "no channel": (Split(GOOD.images[:, 0], GOOD.labels), r"train split: images have shape \(40, 6, 5\).*C = 1"),
    "NaN": (with_pixel(float("nan")), "train split: sample 5 has pixels that are NaN"),
    "infinite": (with_pixel(float("-inf")), "train split: sample 5 has pixels that are NaN or infinite"),
    "integer pixels": (Split(GOOD.images.int(), GOOD.labels), "train split: images are torch.int32. Give uint8"),
    "no samples": (GOOD.take(torch.arange(0)), "train split: no pixels: .*Change the options of the data set"),
    "not tensors": (Split(GOOD.images.numpy(), GOOD.labels), "train split: images are ndarray"),
    "one sample a class": (GOOD.take(torch.arange(4)), r"the monitor split is empty: no class .* \(4 in all\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_with_split_and_sample(case: str):
    split, message = BAD[case]
    with pytest.raises(DataError, match=f"(?s)data set 'mine'.*{message}"):
        load(split)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (make_split(0), "test split: no pixels"),
        (with_label(9), "test split: sample 7 has label 9"),
        (make_split(12, torch.float32), "test split: images are .* torch.float32, those of train"),
        (Split(GOOD.images[..., :4], GOOD.labels), r"test split: images are \(2, 6, 4\)"),
    ],
)
def test_the_test_split_is_checked_as_well(test: Split, message: str):
    with pytest.raises(DataError, match=message):
        load(test=test)


@pytest.mark.parametrize(
    ("share", "split"), [(0.0, "monitor"), (-0.1, "monitor"), (1.0, "train"), (float("nan"), "monitor")]
)
def test_a_monitor_share_that_empties_a_split_is_refused(share: float, split: str):
    with pytest.raises(DataError, match=rf"leaves the {split} split empty.*data\.monitor = 0\.1"):
        load(monitor=share)


def test_a_builder_that_returns_something_else_is_refused():
    with pytest.raises(DataError, match="returned tuple"):
        load_splits(lambda _: (GOOD, GOOD), None, monitor=0.1, split_seed=0, name="mine")
    with pytest.raises(DataError, match="1 classes"):
        load(classes=1)


def test_data_error_has_its_own_exit_code():
    assert DataError.exit_code == 5


def test_small_integer_labels_and_wide_floats_are_converted():
    wide = make_split(dtype=torch.float64)
    splits = load(Split(wide.images, wide.labels.to(torch.int16)), make_split(12, torch.float16))
    assert (splits.train.images.dtype, splits.train.labels.dtype) == (torch.float32, torch.int64)


# ---------------------------------------------------------------- splits


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_monitor_is_stratified_and_disjoint_from_train_and_never_test():
    splits = load()
    assert splits.train.labels.bincount().tolist() == [7] * 4
    assert splits.monitor.labels.bincount().tolist() == [3] * 4
    assert rows(splits.train) | rows(splits.monitor) == rows(make_split())
    assert not rows(splits.train) & rows(splits.monitor)
    assert rows(splits.test) == rows(make_split(12, seed=1))


def test_every_class_with_two_samples_is_on_both_sides():
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] + [4] * 3)
    for share in (0.01, 0.5, 0.99):
        rest, held = (labels[index].bincount(minlength=5).tolist() for index in stratified(labels, share, 0, "t"))
        assert min(rest[0], rest[1], rest[4], held[0], held[1], held[4]) >= 1
        assert (rest[2], held[2]) == (1, 0)


def test_split_depends_on_its_seed_and_not_on_the_global_generator():
    torch.manual_seed(1)
    first, state = load(), torch.get_rng_state()
    torch.manual_seed(2)
    assert load().fingerprint == first.fingerprint
    assert load(seed=1).fingerprint != first.fingerprint
    torch.manual_seed(1)
    load()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_class_is_split_alike_whatever_other_classes_there_are():
    labels = torch.tensor([0, 1, 0, 1, 0, 0])
    alone = stratified(torch.zeros(4, dtype=torch.int64), 0.5, 3, "t")[1]
    zeros = (labels == 0).nonzero().flatten()
    both = stratified(labels, 0.5, 3, "t")[1]
    assert [int(i) for i in both if labels[i] == 0] == zeros[alone].tolist()


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("what", ["pixel", "label"])
def test_fingerprint_changes_with_one_pixel_or_label(part: str, what: str):
    data = {"train": make_split(), "test": make_split(12, seed=1)}
    before = load(**data).fingerprint
    if what == "pixel":
        data[part].images[3, 1, 5, 4] ^= 1
    else:
        data[part].labels[[3, 4]] = data[part].labels[[4, 3]]
    assert load(**data).fingerprint != before


def test_fingerprint_tells_shape_dtype_and_classes_apart():
    data = make_split()
    turned = Split(data.images.view(40, 2, 5, 6), data.labels)
    prints = {load(data, data).fingerprint, load(turned, turned).fingerprint, load(data, data, classes=5).fingerprint}
    prints.add(load(make_split(dtype=torch.float32), make_split(dtype=torch.float32)).fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_statistics_are_those_of_the_train_split(dtype: torch.dtype):
    splits = load(make_split(dtype=dtype), make_split(12, dtype, seed=1))
    pixels = splits.train.images.double() / (255 if dtype == torch.uint8 else 1)
    expected = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor([splits.mean, splits.std]).double(), torch.stack(expected))


def test_a_constant_channel_normalises_to_zero():
    images = make_split().images
    images[:, 0] = 9
    assert statistics(images)[1][0] == 1.0
    batch = make_source(load(Split(images, GOOD.labels))).batch(0)
    torch.testing.assert_close(batch.inputs[:, 0], torch.zeros(8, 6, 5))


def test_splits_move_and_count():
    splits = load(Split(GOOD.images, torch.tensor([0] * 28 + [1] * 12)))
    assert splits.info == DataInfo((2, 6, 5), 4)
    assert splits.majority("train") == pytest.approx(20 / 28)
    moved = splits.to("meta")
    assert moved.train.images.is_meta
    assert moved.fingerprint == splits.fingerprint


# ---------------------------------------------------------------- random numbers

INDEX = torch.arange(20_000)


def reference_bits(key: int, index: int) -> int:
    """splitmix64's finaliser in Python's own integers."""
    mask = (1 << 64) - 1
    x = (index * 0x9E3779B97F4A7C15 + key) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_random_is_splitmix64():
    from kdcore.seeds import derive

    index = torch.tensor([0, 1, 2, 49_999, 2**40])
    random = Random(5, index, 3)
    bits = [reference_bits(derive(5, "lane", 3), int(i)) for i in index]
    assert random.uniform("lane").tolist() == [(b >> 40) / 2**24 for b in bits]
    assert random.integers("lane", -3, 9).tolist() == [((b >> 32) * 12 >> 32) - 3 for b in bits]


def test_random_uniform_is_uniform():
    values = Random(0, INDEX, 0).uniform("x", -2.0, 4.0)
    assert values.dtype == torch.float32
    assert -2 <= values.min() < -1.99
    assert 3.99 < values.max() < 4
    counts = torch.histc(values, 20, -2, 4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_random_integers_are_uniform_and_in_range():
    values = Random(0, INDEX, 0).integers("x", -2, 3)
    assert values.dtype == torch.int64
    counts = (values + 2).bincount()
    assert len(counts) == 5
    assert ((counts - 4000) ** 2 / 4000).sum() < 18.5  # 4 degrees of freedom


def test_random_streams_are_unrelated():
    base = Random(0, INDEX, 0).uniform("x")
    others = [Random(1, INDEX, 0).uniform("x"), Random(0, INDEX, 1).uniform("x"), Random(0, INDEX, 0).uniform("y")]
    others += [base.roll(lag) for lag in (1, 2, 128)]
    for other in others:
        assert torch.corrcoef(torch.stack([base, other]))[0, 1].abs() < 4 / len(INDEX) ** 0.5


def test_random_of_a_sample_is_independent_of_the_batch():
    whole = Random(0, INDEX, 2)
    part = INDEX.flip(0)[::7]
    assert torch.equal(Random(0, part, 2).uniform("x"), whole.uniform("x")[part])
    assert torch.equal(whole.uniform("x"), whole.uniform("x"))


@pytest.mark.parametrize(("low", "high"), [(0, 0), (3, 2), (0, 2**31 + 1)])
def test_random_refuses_an_empty_or_too_wide_range(low: int, high: int):
    with pytest.raises(ValueError, match="range"):
        Random(0, INDEX, 0).integers("x", low, high)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_random_and_augmentation_are_the_same_on_a_gpu():
    images = torch.randn(256, 3, 32, 32)
    host, device = (Random(0, INDEX[:256].to(d), 1) for d in ("cpu", "cuda"))
    assert torch.equal(host.uniform("x", -1, 3), device.uniform("x", -1, 3).cpu())
    assert torch.equal(host.integers("x", 0, 2**31), device.integers("x", 0, 2**31).cpu())
    for transform in (SHIFT, FLIP):
        assert torch.equal(transform(images, host), transform(images.cuda(), device).cpu())


# ---------------------------------------------------------------- augmentation


def test_shift_is_a_random_crop_of_the_padded_image():
    images = make_split().images
    random = Random(0, torch.arange(40), 0)
    top, left = (random.integers(lane, 0, 5) for lane in ("shift.y", "shift.x"))
    padded = torch.nn.functional.pad(images, [2] * 4)
    crops = [p[:, y : y + 6, x : x + 5] for p, y, x in zip(padded, top, left, strict=True)]
    assert torch.equal(SHIFT(images, random), torch.stack(crops))
    assert {*top.tolist()} == {*left.tolist()} == set(range(5))


def test_shift_by_more_than_the_image_leaves_zeros():
    far = shift(torch.ones(64, 1, 3, 3), Random(0, torch.arange(64), 0), ShiftOptions(pixels=9))
    assert set(far.unique().tolist()) == {0.0, 1.0}


def test_flip_mirrors_about_half():
    images = make_split(400).images
    out = FLIP(images, Random(0, torch.arange(400), 0))
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert ((out == images).flatten(1).all(1) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_augmentation_of_a_sample_is_the_same_in_any_batch():
    splits = load()
    small, large = (make_source(splits, batch_size=n, transforms=[MOVED, MIRRORED]) for n in (1, 28))
    whole = large.batch(1)  # the whole of epoch 1
    for position in range(28):
        one = small.batch(28 + position)
        assert torch.equal(one.inputs[0], whole.inputs[position])
        assert one.index[0] == whole.index[position]


def test_augmentation_changes_with_epoch_and_seed():
    source, other = (
        make_source(batch_size=28, transforms=[MOVED]),
        make_source(batch_size=28, seed=1, transforms=[MOVED]),
    )
    images = [b.inputs[b.index.argsort()] for b in (source.batch(0), source.batch(1), other.batch(0))]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_transforms_run_after_normalisation_in_order():
    seen = []

    def record(name, batch, random):
        seen.append((name, batch.inputs.mean().abs() < 0.2, random.epoch))
        return batch

    make_source(batch_size=28, transforms=[partial(record, "a"), partial(record, "b")]).batch(0)
    assert seen == [("a", True, 0), ("b", True, 0)]


# ---------------------------------------------------------------- source


def test_batch_is_a_pure_function_of_the_step():
    splits = load()
    forward = [make_source(splits, transforms=[MOVED]).batch(step) for step in range(12)]
    source = make_source(splits, transforms=[MOVED])
    for step in (11, 0, 7, 7, 3, 10, 1):
        assert same(source.batch(step), forward[step])


def test_an_epoch_has_every_sample_once_in_a_new_order():
    source = make_source()
    assert source.steps_per_epoch == 4
    epochs = [torch.cat([source.batch(4 * e + s).index for s in range(4)]) for e in range(3)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(28))
    assert len({tuple(order.tolist()) for order in epochs}) == 3
    assert source.batch(3).inputs.shape == (4, 2, 6, 5)
    assert [source.batch(s).epoch for s in (0, 3, 4)] == [0, 0, 1]


def test_order_depends_on_seed_data_and_epoch_alone():
    splits = load()

    def order(splits, seed=0, batch_size=28, transforms=()):
        return make_source(splits, seed, batch_size, transforms=transforms).batch(0).index.tolist()

    base = order(splits)
    torch.manual_seed(9)
    assert order(splits, transforms=[MIRRORED]) == base
    assert order(splits, batch_size=7) == base[:7]
    assert order(splits, seed=1) != base
    assert order(replace(splits, fingerprint="0" * 64)) != base


def test_source_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    make_source(transforms=[MOVED, MIRRORED]).batch(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_is_normalised_float_and_matches_its_index():
    for dtype, scale in ((torch.uint8, 255), (torch.float32, 1)):
        splits = load(make_split(dtype=dtype), make_split(12, dtype, seed=1))
        batch = make_source(splits).batch(2)
        mean, std = (torch.tensor(v)[:, None, None] for v in (splits.mean, splits.std))
        expected = (splits.train.images[batch.index].float() / scale - mean) / std
        torch.testing.assert_close(batch.inputs, expected)
        assert torch.equal(batch.target, splits.train.labels[batch.index])
        assert (batch.inputs.dtype, batch.target.dtype, batch.index.dtype) == (torch.float32, torch.int64, torch.int64)


def test_uint8_stays_uint8_in_memory():
    assert make_source().train.images.dtype == torch.uint8


def test_drop_last_leaves_out_the_ragged_batch():
    source = make_source(drop_last=True)
    assert source.steps_per_epoch == 3
    assert all(len(source.batch(step).index) == 8 for step in range(7))
    assert source.batch(3).epoch == 1


@pytest.mark.parametrize(("size", "message"), [(29, "batch_size 29 .* 28 samples"), (0, "batch_size is 0")])
def test_no_step_is_an_error_that_says_sizes(size: int, message: str):
    with pytest.raises(DataError, match=message):
        make_source(batch_size=size, drop_last=True)


def test_eval_batches_are_in_order_and_leave_the_split_alone():
    for dtype in (torch.uint8, torch.float32):
        splits = load(make_split(dtype=dtype), make_split(12, dtype, seed=1))
        before = splits.test.images.clone()
        parts = list(eval_batches(splits.test, splits, CPU, size=5))
        assert [len(target) for _, target in parts] == [5, 5, 2]
        assert torch.equal(torch.cat([target for _, target in parts]), splits.test.labels)
        whole = next(eval_batches(splits.test, splits, CPU))[0]
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), whole)
        assert torch.equal(splits.test.images, before)


def test_source_has_no_knobs_and_no_options():
    assert make_source().knobs == {}
    assert EpochSource.Options is Options


# ---------------------------------------------------------------- data sets


def test_digits_are_real_embedded_and_always_split_alike():
    data = digits(DigitsOptions())
    assert (len(data.train), len(data.test), data.classes) == (1438, 359, 10)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.max() == 255
    assert data.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert torch.equal(digits(DigitsOptions()).test.images, data.test.images)
    assert len(digits(DigitsOptions(test=0.5)).test) in range(890, 910)


def test_synthetic_has_the_asked_shape_and_is_a_function_of_its_seed():
    options = SyntheticOptions(samples=60, test_samples=30, classes=3, channels=1, size=9)
    data = synthetic(options)
    assert data.train.images.shape == (60, 1, 9, 9)
    assert data.test.labels.bincount().tolist() == [10, 10, 10]
    assert torch.equal(synthetic(options).train.images, data.train.images)
    other = synthetic(options.model_copy(update={"data_seed": 1}))
    assert not torch.equal(other.train.images, data.train.images)


def test_synthetic_classes_have_one_mean_but_own_patterns():
    data = synthetic(SyntheticOptions(samples=4000, classes=2, noise=0.0, channels=1))
    first, second = (data.train.images[data.train.labels == c].float() for c in (0, 1))
    assert (first.mean(0) - second.mean(0)).abs().max() < 8  # of 256: a linear model sees nothing
    patterns = [{tuple(image.flatten().tolist()) for image in part} for part in (first, second)]
    assert not patterns[0] & patterns[1]


def write_mnist(root: Path, samples: int = 30) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", samples), ("t10k", 20)):
        pixels = np.arange(count * 28 * 28, dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def write_cifar(root: Path, folder: str, names: list[str], key: str, classes: int) -> None:
    (root / folder).mkdir(parents=True)
    for name in names:
        pixels = np.arange(2 * classes * 3072, dtype=np.uint64).astype(np.uint8).reshape(-1, 3072)
        content = pickle.dumps({"data": pixels, key: [i % classes for i in range(2 * classes)]})
        (root / folder / name).write_bytes(content)


def write_cifar10(root: Path) -> None:
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    write_cifar(root, "cifar-10-batches-py", [*batches, "test_batch"], "labels", 10)


def test_mnist_reads_torchvision_files(tmp_path: Path):
    write_mnist(tmp_path)
    data = mnist(TorchvisionOptions(root=str(tmp_path)))
    assert data.train.images.shape == (30, 1, 28, 28)
    assert data.train.images.flatten()[:3].tolist() == [0, 1, 2]
    assert data.test.labels.bincount().tolist() == [2] * 10
    splits = load_splits(mnist, TorchvisionOptions(root=str(tmp_path)), monitor=0.3, split_seed=0, name="mnist")
    assert splits.info == DataInfo((1, 28, 28), 10)


def test_cifar10_in_another_order_needs_verify_false(tmp_path: Path):
    write_cifar10(tmp_path)
    data = cifar10(TorchvisionOptions(root=str(tmp_path), verify=False))
    assert data.train.images.shape == (100, 3, 32, 32)
    assert data.train.images[0].flatten()[1000:1003].tolist() == [232, 233, 234]  # channels first, as in the file
    with pytest.raises(DataError, match=r"cannot read CIFAR10: .*verify = false"):
        cifar10(TorchvisionOptions(root=str(tmp_path)))


def test_cifar100_has_fine_labels(tmp_path: Path):
    write_cifar(tmp_path, "cifar-100-python", ["train", "test"], "fine_labels", 100)
    data = cifar100(TorchvisionOptions(root=str(tmp_path), verify=False))
    assert (len(data.train), data.classes, int(data.test.labels.max())) == (200, 100, 99)


def write_svhn(root: Path, labels: np.ndarray | None = None, part: str = "train", samples: int = 40) -> Path:
    """As published: X is [32, 32, 3, N], y [N, 1] from 1 to 10, where 10 stands for the digit 0."""
    path = root / f"{part}_32x32.mat"
    pixels = np.arange(samples * 3072, dtype=np.uint64).astype(np.uint8).reshape(-1, 3, 32, 32)
    labels = np.arange(samples, dtype=np.uint8) % 10 + 1 if labels is None else labels
    savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": labels[:, None]}, do_compression=True)
    return path


def load_svhn(root: Path, **options: bool) -> Splits:
    chosen = TorchvisionOptions(root=str(root), **{"verify": False, **options})
    return load_splits(svhn, chosen, monitor=0.3, split_seed=0, name="svhn")


def test_svhn_reads_the_published_layout(tmp_path: Path):
    for part in ("train", "test"):
        write_svhn(tmp_path, part=part)
    data = svhn(TorchvisionOptions(root=str(tmp_path), verify=False))
    assert data.train.images.shape == (40, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.images.flatten(), torch.arange(40 * 3072).to(torch.uint8))
    assert data.train.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert load_svhn(tmp_path).info == DataInfo((3, 32, 32), 10)


def test_svhn_with_another_md5_needs_verify_false(tmp_path: Path):
    for part in ("train", "test"):
        write_svhn(tmp_path, part=part)
    with pytest.raises(DataError, match=r"cannot read SVHN: .*verify = false"):
        load_svhn(tmp_path, verify=True)


def test_svhn_takes_a_file_whose_md5_is_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision.datasets import SVHN

    files = [write_svhn(tmp_path, part=part) for part in ("train", "test")]
    sums = (hashlib.md5(file.read_bytes()).hexdigest() for file in files)
    parts = {name: ["", f"{name}_32x32.mat", md5] for name, md5 in zip(("train", "test"), sums, strict=True)}
    monkeypatch.setattr(SVHN, "split_list", parts)
    assert len(load_svhn(tmp_path, verify=True).test) == 40


class Shell:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


SPOILED = {
    "cut": lambda good: good[: len(good) // 2],
    "cut between its arrays": lambda good: good[: 136 + struct.unpack("<i", good[132:136])[0]],
    "empty": lambda good: b"",
    "a pickle": lambda good: pickle.dumps([Shell(), bytes(200)]),
    "of MATLAB 7.3": lambda good: good[:124] + b"\0\2IM" + good[128:],
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_svhn_file_is_a_data_error_and_runs_nothing(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = write_svhn(tmp_path)
    write_svhn(tmp_path, part="test")
    path.write_bytes(SPOILED[how](path.read_bytes()))
    with pytest.raises(DataError, match=f"{tmp_path}: cannot read SVHN: .*Delete the files, and write download = true"):
        load_svhn(tmp_path)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(40) % 10 + 2, "train split: sample 9 has label 11 .*from 0 to 9"),
        (np.arange(40) % 10 - 1, "train split: sample 0 has label -1"),
        (np.arange(30) % 10, "train split: 40 images but 30 labels"),
    ],
)
def test_svhn_labels_that_do_not_fit_are_refused(labels: np.ndarray, message: str, tmp_path: Path):
    write_svhn(tmp_path, labels.astype(np.int16))
    write_svhn(tmp_path, part="test")
    with pytest.raises(DataError, match=message):
        load_svhn(tmp_path)


def test_svhns_extra_split_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision.datasets import SVHN

    def download(self) -> None:
        path = write_svhn(tmp_path, part=self.split)
        self.split_list = {self.split: ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]}

    monkeypatch.setattr(SVHN, "download", download)
    assert len(load_svhn(tmp_path, download=True).test) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]


@pytest.mark.parametrize("build", [mnist, cifar10, cifar100, svhn])
def test_a_missing_set_names_the_file_and_the_way_to_get_it(build, tmp_path: Path):
    with pytest.raises(DataError, match=rf"{tmp_path}.*does not exist.*download = true"):
        build(TorchvisionOptions(root=str(tmp_path)))


def test_one_missing_file_is_named(tmp_path: Path):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4 does not exist"):
        cifar10(TorchvisionOptions(root=str(tmp_path), verify=False))


def test_a_damaged_file_is_a_data_error(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(DataError, match=r"cannot read MNIST.*download = true"):
        mnist(TorchvisionOptions(root=str(tmp_path)))


def test_download_is_torchvisions_and_only_for_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision.datasets import MNIST

    calls = []
    monkeypatch.setattr(MNIST, "download", lambda self: calls.append(1) or (len(calls) > 1) or write_mnist(tmp_path))
    options = TorchvisionOptions(root=str(tmp_path), download=True)
    assert len(mnist(options).train) == 30
    mnist(options)
    assert len(calls) == 2  # train and test part of the first reading


def test_a_download_that_fails_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision.datasets import CIFAR10

    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(DataError, match="no route to host"):
        cifar10(TorchvisionOptions(root=str(tmp_path), download=True))


def test_options_import_no_torch():
    code = "import sys, kdcore.data.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
