"""Own data: every form gives the same splits, and what is wrong is said with its sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kdcore
from kdcore.data import load_splits
from kdcore.data.own import own_dataset
from kdcore.errors import DataError

GREY = torch.randint(256, (40, 1, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
COLOUR = torch.randint(256, (40, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 4


class Pairs(torch.utils.data.Dataset):
    def __init__(self, images: Any, labels: Any = LABELS) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Any:
        return self.images[number], self.labels[number]


def dataset(train: Any, test: Any = (GREY, LABELS), monitor: Any = None, **options: Any) -> kdcore.Dataset:
    given = {"classes": None, "mean": None, "std": None, "tell": lambda *_: None, **options}
    return own_dataset(train, test, monitor, **given)


def splits(data: kdcore.Dataset, share: float = 0.25):
    return load_splits(lambda _: data, None, monitor=share, split_seed=0, name="mine")


# ---------------------------------------------------------------- forms


def forms(images: torch.Tensor) -> list[Any]:
    last = images.movedim(1, 3).numpy()
    pictures = [Image.fromarray(image.squeeze()) for image in last]
    return [
        kdcore.Split(images, LABELS),
        (images, LABELS),
        (last, LABELS.numpy()),
        (images.numpy(), LABELS.tolist()),
        Pairs(images),
        Pairs(last, LABELS.numpy()),
        Pairs(pictures, LABELS.tolist()),
        torch.utils.data.TensorDataset(images, LABELS),
        list(zip(images, LABELS, strict=True)),
    ]


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_form_of_the_same_images_gives_the_same_data(images):
    for form in forms(images):
        found = dataset(form, (images, LABELS)).train
        assert torch.equal(found.images, images)
        assert found.images.dtype == torch.uint8
        assert torch.equal(torch.as_tensor(found.labels), LABELS)


def test_grey_images_need_no_channel():
    for form in ((GREY[:, 0], LABELS), (GREY[:, 0].numpy(), LABELS), Pairs(GREY[:, 0]), Pairs(GREY[:, 0].numpy())):
        assert torch.equal(dataset(form).train.images, GREY)


def test_arrays_that_torch_cannot_share_are_copied():
    images = np.frombuffer(GREY.numpy().tobytes(), dtype=np.uint8).reshape(GREY.shape)  # cannot be written
    labels = LABELS.numpy().astype(np.uint16)
    for form in ((images, labels), (GREY.flip(0).numpy()[::-1], labels[::-1][::-1]), Pairs(images, labels)):
        found = dataset(form).train
        assert torch.equal(found.images, GREY)
        assert torch.equal(found.labels, LABELS)


def test_an_array_whose_channels_may_be_on_either_side_is_refused():
    with pytest.raises(
        DataError, match=r"array of shape \(3, 4, 4\) may be its first axis or its last\. Give a tensor"
    ):
        dataset((np.zeros((40, 3, 4, 4), np.float32), LABELS))
    with pytest.raises(DataError, match=r"train=\.\.\.\): an array of object"):
        dataset((np.full((40, 4, 4), None), LABELS))


def test_a_dataset_with_both_splits_is_taken_as_it_is():
    data = kdcore.Dataset(kdcore.Split(GREY, LABELS), kdcore.Split(GREY[:9], LABELS[:9]), 5)
    assert dataset(data, None) == data
    with pytest.raises(DataError, match=r"test=\.\.\.\): train is a kdcore.Dataset, which has a test split"):
        dataset(data, (GREY, LABELS))


def test_classes_are_counted_over_all_splits():
    assert dataset((GREY, LABELS), (GREY, LABELS + 2)).classes == 6
    assert dataset((GREY, LABELS), classes=10).classes == 10


def test_a_monitor_split_of_its_own_leaves_train_whole():
    whole = splits(dataset((GREY, LABELS), monitor=(GREY[:8], LABELS[:8])))
    assert (len(whole.train), len(whole.monitor), whole.carved) == (40, 8, False)
    carved = splits(dataset((GREY, LABELS)))
    assert (len(carved.train), len(carved.monitor), carved.carved) == (32, 8, True)
    assert whole.fingerprint != carved.fingerprint


# ---------------------------------------------------------------- normalisation


def test_floating_images_stay_as_they_are():
    found = splits(dataset((GREY / 255, LABELS), (GREY / 255, LABELS)))
    assert (found.mean, found.std) == ((0.0,), (1.0,))
    assert found.train.images.dtype == torch.float32
    assert splits(dataset((GREY.double(), LABELS), (GREY.double(), LABELS))).train.images.dtype == torch.float32


def test_bytes_are_normalised_by_the_train_split_unless_the_statistics_are_given():
    measured, given = splits(dataset((GREY, LABELS))), splits(dataset((GREY, LABELS), mean=0.5, std=[0.25]))
    assert measured.mean[0] == pytest.approx(measured.train.images.double().mean().item() / 255)
    assert (given.mean, given.std) == ((0.5,), (0.25,))
    assert measured.fingerprint != given.fingerprint
    assert given.fingerprint != splits(dataset((GREY, LABELS), mean=0.5, std=0.2)).fingerprint


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.5, None, "only one of mean and std is given"),
        ((0.5, 0.5), 1.0, "for 1 channels"),
        (0.5, 0.0, "deviations above 0"),
        (float("nan"), 1.0, "Give finite numbers"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(mean, std, text):
    with pytest.raises(DataError, match=text):
        splits(dataset((GREY, LABELS), mean=mean, std=std))


# ---------------------------------------------------------------- refusals


class Restless(Pairs):
    """Flips every image with probability one half."""

    def __getitem__(self, number: int) -> Any:
        image, label = super().__getitem__(number)
        return (image.flip(2) if torch.rand(()) < 0.5 else image), label


def test_random_augmentation_inside_is_refused_with_advice():
    with pytest.raises(DataError, match=r"train=\.\.\.\): sample \d+ is another one .* name it in transforms="):
        dataset(Restless(GREY))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (None, "NoneType is no data set"),
        (iter([]), "is no data set"),
        ([], "it has no samples"),
        ([1, 2], "sample 0 is int, not a pair"),
        (Pairs(GREY, [0.5] * 40), "sample 0 has the label 0.5"),
        (Pairs(GREY, [torch.ones(4)] * 40), "sample 0 has the label"),
        (Pairs([*GREY[:39], COLOUR[0]]), r"sample 39 is \(3, 6, 5\)"),
        (Pairs([*GREY[:39], GREY[39].float()]), r"sample 39 is .* torch.float32, the first"),
        (Pairs(np.zeros((40, 7, 8, 9))), "no axis of 1, 3 or 4"),
        (Pairs([Image.new("P", (5, 6))] * 40), "mode 'P'. Convert it"),
        (Pairs(["a.png"] * 40), "the image is str"),
        (Pairs(torch.zeros(40, 2, 1, 6, 5)), r"the image has shape \(2, 1, 6, 5\)"),
        ((GREY, LABELS[:7]), "40 images but 7 labels"),
        ((GREY, torch.eye(40)), "not one-hot"),
        ((torch.full((40, 1, 6, 5), float("nan")), LABELS), r"train split: sample 0 has pixels that are NaN"),
        (Pairs(torch.full((40, 1, 6, 5), float("nan"))), r"train split: sample 0 has pixels that are NaN"),
        ((GREY, LABELS - 1), "train split: sample 0 has label -1"),
    ],
)
def test_data_that_cannot_be_used_names_the_argument_and_the_sample(form, text):
    floating = isinstance(form, tuple | Pairs) and "NaN" in text
    with pytest.raises(DataError, match=text):
        splits(dataset(form, (GREY / 255, LABELS) if floating else (GREY, LABELS)))


def test_a_missing_test_split_is_said():
    with pytest.raises(DataError, match=r"distill\(test=\.\.\.\): missing"):
        dataset((GREY, LABELS), None)


def test_reading_is_told_and_holds_one_copy():
    told = []
    dataset(Pairs(GREY.repeat(20, 1, 1, 1), LABELS.repeat(20)), tell=lambda *event: told.append(event))
    assert told == [("train", 0, 800), ("train", 256, 800), ("train", 512, 800), ("train", 768, 800)]
