"""The data sets that the core registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..seeds import derive
from .options import DigitsOptions, SyntheticOptions, TorchvisionOptions
from .splits import stratified
from .types import Dataset, Split

DIGITS_SPLIT_SEED = 0  # never an option: test samples must not depend on what is tried on them
MODES = 4  # patterns of a synthetic class


def digits(options: DigitsOptions) -> Dataset:
    """scikit-learn's 1,797 real digits, [N, 1, 8, 8] uint8, with a fixed stratified test split."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images * (255 / 16)).round().to(torch.uint8)[:, None]
    everything = Split(images, torch.from_numpy(raw.target).long())
    train, test = stratified(everything.labels, options.test, DIGITS_SPLIT_SEED, "digits test")
    return Dataset(everything.take(train), everything.take(test), 10)


def synthetic(options: SyntheticOptions) -> Dataset:
    """Random patterns under shift, polarity and noise, uint8, the same on every machine.

    A class is a set of smooth random patterns (MODES of them). An image is one of them, moved cyclically by up to
    size // 8 pixels, multiplied by +1 or -1, with Gaussian noise. The sign makes the mean of every class the same, so
    that a linear model stays near chance; shifts and noise ask for several convolutions. With the default options,
    at half width, after 10 epochs: cnn-1 0.24, cnn-2 0.58, cnn-4 0.97.
    """
    shape = (options.classes * MODES, options.channels)
    generator = torch.Generator().manual_seed(derive(options.data_seed, "synthetic", "patterns"))
    coarse = torch.randn(*shape, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=options.size, mode="bicubic", align_corners=False)
    patterns = patterns / patterns.flatten(1).std(1)[:, None, None, None]
    return Dataset(
        train=_draw(patterns, options, options.samples, "train"),
        test=_draw(patterns, options, options.test_samples, "test"),
        classes=options.classes,
    )


def _draw(patterns: Tensor, options: SyntheticOptions, samples: int, part: str) -> Split:
    generator = torch.Generator().manual_seed(derive(options.data_seed, "synthetic", part))
    labels = torch.arange(samples) % options.classes  # balanced; the order is the source's business
    mode = torch.randint(MODES, (samples,), generator=generator)
    reach = options.size // 8
    dy, dx = torch.randint(-reach, reach + 1, (2, samples, 1), generator=generator)
    rows, columns = ((torch.arange(options.size) + d) % options.size for d in (dy, dx))
    channels = torch.arange(options.channels)[None, :, None, None]
    which = (labels * MODES + mode)[:, None, None, None]
    signal = patterns[which, channels, rows[:, None, :, None], columns[:, None, None, :]]
    sign = torch.randint(2, (samples, 1, 1, 1), generator=generator) * 2 - 1
    noisy = signal * sign + options.noise * torch.randn(signal.shape, generator=generator)
    return Split((128 + 40 * noisy).round().clamp(0, 255).to(torch.uint8), labels)


def mnist(options: TorchvisionOptions) -> Dataset:
    """MNIST, [60,000 and 10,000, 1, 28, 28] uint8."""
    from torchvision.datasets import MNIST

    stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return _torchvision(MNIST, options, [f"MNIST/raw/{stem}-ubyte" for stem in stems], 10)


def cifar10(options: TorchvisionOptions) -> Dataset:
    """CIFAR-10, [50,000 and 10,000, 3, 32, 32] uint8."""
    from torchvision.datasets import CIFAR10

    return _torchvision(CIFAR10, options, _cifar_files(CIFAR10), 10)


def cifar100(options: TorchvisionOptions) -> Dataset:
    """CIFAR-100 with fine labels, [50,000 and 10,000, 3, 32, 32] uint8."""
    from torchvision.datasets import CIFAR100

    return _torchvision(CIFAR100, options, _cifar_files(CIFAR100), 100)


def svhn(options: TorchvisionOptions) -> Dataset:
    """SVHN's cropped digits, [73,257 and 26,032, 3, 32, 32] uint8; its third, "extra" split is not used.

    The published label 10 of the digit 0 is class 0.
    """
    from torchvision.datasets import SVHN

    files = [SVHN.split_list[part][1] for part in ("train", "test")]
    return _torchvision(SVHN, options, files, 10, parts=({"split": "train"}, {"split": "test"}))


def _cifar_files(published: Any) -> list[str]:
    return [f"{published.base_folder}/{name}" for name, _ in published.train_list + published.test_list]


def _torchvision(
    published: Any,
    options: TorchvisionOptions,
    files: list[str],
    classes: int,
    parts: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False}),
) -> Dataset:
    root = Path(options.root).expanduser()
    missing = [root / file for file in files if not (root / file).is_file()]
    if missing and not options.download:
        fix = "Correct data.root, or write download = true."
        raise DataError(f"{missing[0]} does not exist", where="data.root", fix=fix)
    # what was just downloaded is always verified: torchvision would take unverified files for complete ones
    has_md5 = hasattr(published, "_check_integrity")
    skip = has_md5 and not options.verify and not missing
    reader = _unverified(published) if skip else published
    advice = "Delete the files, and write download = true."
    if has_md5 and not skip:
        advice = "If the files are complete but in another order than the published ones, write verify = false."
    with _readable(root, published.__name__, advice):
        train, test = (_split(reader(root, **part, download=bool(missing))) for part in parts)
    return Dataset(train, test, classes)


def _unverified(published: Any) -> Any:
    """A class that skips the md5 sums, and CIFAR's names of the classes, since nothing needs them."""
    return type(published.__name__, (published,), {"_check_integrity": lambda _: True, "_load_meta": lambda _: None})


def _split(raw: Any) -> Split:
    if hasattr(raw, "labels"):  # SVHN, whose images have their channels first
        return Split(torch.as_tensor(raw.data).contiguous(), torch.as_tensor(raw.labels))
    images, labels = torch.as_tensor(raw.data), torch.as_tensor(raw.targets)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), labels.long())


@contextmanager
def _readable(root: Path, name: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torchvision asserts, unpickles and downloads: anything can come out
        raise DataError(f"cannot read {name}: {error!r}", where=str(root), fix=advice) from error
