"""A student trained as public CIFAR code has it: PIL transforms in a DataLoader, float32, a teacher run on every batch.

What the comparison in equal_science.py holds equal is the recipe's: split, optimizer, rate of every step, clipping,
weights of the losses, and the statistics that images are normalised by. Random numbers are this loop's own, and the
crop fills in black, as torchvision's does.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from competitors import Objective, textbook
from kdcore_vision.cifar import BUILDERS
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdcore.data import Split, Splits
from kdcore.data.source import eval_batches
from kdcore.training.member import load_weights


@dataclass(frozen=True)
class Lesson:
    """What one student is trained by.

    Args:
        models: names in the CIFAR zoo: teacher and student.
        weights: the teacher's.
        data: of the recipe: batch_size and shift count.
        train: of the recipe.
        dkd: weight of DKD beside cross-entropy.
        seed: of everything that is random.
        workers: of the DataLoader.
    """

    models: tuple[str, str]
    weights: Path
    data: Mapping[str, Any]
    train: Mapping[str, Any]
    dkd: float
    seed: int
    workers: int


def rate(step: int, steps: int, train: Mapping[str, Any]) -> float:
    """The learning rate of a step, from 0: linear warm-up times half a cosine. An epoch has ``steps``."""
    warm = train["warmup_epochs"] * steps
    ramp = min((step + 1) / warm, 1.0) if warm else 1.0
    return float(train["lr"] * ramp * 0.5 * (1 + math.cos(math.pi * step / (steps * train["epochs"]))))


def objective(dkd: float) -> Objective:
    """Cross-entropy and DKD of this weight, of which alpha and beta take a part each."""
    plain = Objective(normalize="none", cross_entropy=True)
    return Objective(normalize="none", cross_entropy=True, alpha=dkd * plain.alpha, beta=dkd * plain.beta)


def loader_of(lesson: Lesson, splits: Splits) -> DataLoader[Any]:
    """Augmented batches of the training split, in another order every epoch."""
    side = splits.info.shape[1]
    crop, flip = transforms.RandomCrop(side, padding=lesson.data["shift"]), transforms.RandomHorizontalFlip()
    augment = transforms.Compose([crop, flip, transforms.ToTensor(), transforms.Normalize(splits.mean, splits.std)])
    images = splits.train.images
    assert isinstance(images, Tensor), "CIFAR lies in memory"
    arrays, labels = images.permute(0, 2, 3, 1).contiguous().numpy(), splits.train.labels.tolist()

    class Pictures(Dataset[Any]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, i: int) -> Any:
            return augment(Image.fromarray(arrays[i])), labels[i]

    return DataLoader(
        Pictures(), lesson.data["batch_size"], shuffle=True, num_workers=lesson.workers, drop_last=True,
        persistent_workers=lesson.workers > 0,
    )  # fmt: skip


def trained(lesson: Lesson, splits: Splits, tell: Callable[[str], None]) -> dict[str, Any]:
    """Trains a student; its accuracies as the tables name them, and the seconds it took, evaluation included."""
    torch.manual_seed(lesson.seed)
    teacher, student = (BUILDERS[name](splits.info) for name in lesson.models)
    load_weights(teacher.eval(), lesson.weights, "the teacher")
    options = {key: value for key, value in lesson.train["optimizer"].items() if key != "name"}
    optimizer = torch.optim.SGD(student.parameters(), lesson.train["lr"], **options)
    loader, start, curve = loader_of(lesson, splits), time.perf_counter(), []
    best: nn.Module = student
    for epoch in range(lesson.train["epochs"]):
        _epoch(epoch, lesson, loader, teacher, student, optimizer)
        curve.append(accuracy(student, splits.monitor, splits))
        best = copy.deepcopy(student) if curve[-1] > max(curve[:-1], default=-1.0) else best
        tell(f"seed {lesson.seed}, epoch {epoch + 1}: {curve[-1]:.2%} on the monitor split")
    seconds = time.perf_counter() - start
    last, at_best = (accuracy(model, splits.test, splits) for model in (student, best))
    measures = {"test": last, "test_at_best": at_best, "monitor": curve[-1], "best_monitor": max(curve)}
    return {"variant": "dkd", "seed": lesson.seed, **measures, "curve": curve, "seconds": round(seconds, 3)}


def _epoch(
    epoch: int, lesson: Lesson, loader: DataLoader[Any], teacher: nn.Module, student: nn.Module, optimizer: Any
) -> None:
    aim, steps = objective(lesson.dkd), len(loader)
    student.train()
    for number, (inputs, target) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = rate(epoch * steps + number, steps, lesson.train)
        with torch.no_grad():
            taught = teacher(inputs)
        loss = textbook(student(inputs), taught, target, aim)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), lesson.train["clip"])
        optimizer.step()
        loss.item()  # its meters


def accuracy(model: nn.Module, split: Split, splits: Splits) -> float:
    """The share of a split that it gets right, in float32."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in eval_batches(split, splits, "cpu"))
    return right / len(split)
