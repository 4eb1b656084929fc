"""The ways to train a student that bench_training.py compares, each in a process of its own.

A process is told what to time as JSON in its first line; then every line is a number of steps, answered by the seconds
that they took, and the end of its input by what it cost: memory, shares of a step, how busy the GPU was. Of an
exception the answer is its text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from itertools import count
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from competitors import Objective, careful_a, textbook
from torch import Tensor, nn
from training_costs import costs, timed

CLASSES, SIDE = 100, 32
OBJECTIVE = Objective(normalize="none", cross_entropy=True)
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
LOGITS = {"path": ".", "io": "output"}  # of a network, in torchdistill's words
STAGE = ExitStack()  # what is set around a stage, until the process ends


@dataclass(frozen=True)
class Setting:
    """What every way is told."""

    way: str
    teacher: str
    student: str
    batch: int
    samples: int
    device: str
    threads: int
    workers: int  # of a DataLoader
    precision: str = "bfloat16"  # of kdcore and the ten lines; the others are float32
    students: int = 1  # under one teacher; kdcore's ways alone have more
    folder: str = ""  # its own, for a store

    @property
    def name(self) -> str:
        return self.way if self.students == 1 else f"{self.way} x {self.students}"


Way = Callable[[Setting], Callable[[], None]]


def pictures(setting: Setting) -> tuple[Tensor, Tensor]:
    """Noise of CIFAR-100's shape: [N, 3, 32, 32] uint8 and [N] int64. Speed does not look at pixels."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.samples, 3, SIDE, SIDE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images, torch.randint(CLASSES, (setting.samples,), generator=generator)


def model(name: str, setting: Setting) -> nn.Module:
    """A network of the CIFAR zoo, the same for every way."""
    from kdcore_vision.cifar import BUILDERS

    import kdcore

    torch.manual_seed(0)
    return BUILDERS[name](kdcore.DataInfo((3, SIDE, SIDE), CLASSES)).to(setting.device)


# -- what others write


def published(setting: Setting) -> Callable[[], None]:
    """(a) As public CIFAR code has it: PIL transforms in a DataLoader, float32, the teacher run on every batch."""
    from torch.utils.data import DataLoader

    torch.backends.cudnn.benchmark = True  # as in its scripts
    loader: Any = DataLoader(pil_pictures(setting), shuffle=True, **loading(setting))
    teacher, student = model(setting.teacher, setting).eval(), model(setting.student, setting).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    batches = (batch for _ in count() for batch in loader)

    def step() -> None:
        inputs, target = (part.to(setting.device) for part in next(batches))
        with torch.no_grad():
            taught = teacher(inputs)
        loss = textbook(student(inputs), taught, target, OBJECTIVE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # its meters

    return step


def pil_pictures(setting: Setting) -> Any:
    """The pictures as torchvision's CIFAR100 gives them, with the usual transforms."""
    from PIL import Image
    from torch.utils.data import Dataset
    from torchvision import transforms

    images, labels = pictures(setting)
    arrays, numbers = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
    steps = [transforms.RandomCrop(SIDE, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    augment = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    class Pictures(Dataset[Any]):
        def __len__(self) -> int:
            return len(numbers)

        def __getitem__(self, i: int) -> Any:
            return augment(Image.fromarray(arrays[i])), numbers[i]

    return Pictures()


def loading(setting: Setting) -> dict[str, Any]:
    """Options of a DataLoader."""
    return {
        "batch_size": setting.batch, "num_workers": setting.workers, "drop_last": True,
        "pin_memory": setting.device != "cpu", "persistent_workers": setting.workers > 0,
    }  # fmt: skip


def torchdistill(setting: Setting) -> Callable[[], None]:
    """(d) As a user of torchdistill has it: its box by a configuration, its loop with its meters. It has no DKD: KD."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger

    torch.backends.cudnn.benchmark = True  # as in its examples
    teacher, student = model(setting.teacher, setting).eval(), model(setting.student, setting)
    data, config, device = {"train": pil_pictures(setting)}, torchdistill_config(setting), torch.device(setting.device)
    box = get_distillation_box(teacher, student, data, config, device, None, False, 1)
    meters = MetricLogger(delimiter="  ")

    def epochs() -> Iterator[Any]:
        for epoch in count():
            box.pre_epoch_process(epoch=epoch)
            yield from meters.log_every(box.train_data_loader, 100, f"Epoch: [{epoch}]")

    batches = epochs()

    def step() -> None:
        inputs, target, extra = next(batches)
        inputs, target = inputs.to(device), target.to(device)
        box.pre_forward_process()
        loss = box.forward_process(inputs, target, extra)
        box.post_forward_process(loss=loss)
        meters.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])

    return step


def torchdistill_config(setting: Setting) -> dict[str, Any]:
    """What its users write as YAML."""
    from torch.utils.data import RandomSampler

    logits = {f"{who}_module_{what}": value for who in ("student", "teacher") for what, value in LOGITS.items()}
    kd = {"key": "KDLoss", "kwargs": {**logits, "temperature": 4.0, "alpha": 1.0, "beta": 1.0}}
    return {
        "num_epochs": 1000,
        "train_data_loader": {
            "dataset_id": "train", "sampler": {"class_or_func": RandomSampler}, "kwargs": loading(setting),
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {
            "key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }  # fmt: skip


def ten_lines(
    setting: Setting, *, teach: bool = True, compiled: bool = False, kept: bool = False
) -> Callable[[], None]:
    """(c) What a competent user writes: resident data, bfloat16, channels_last, a fused optimizer.

    Args:
        setting: what every way is told.
        teach: by a teacher too, and not by labels alone.
        compiled: both networks by torch.compile.
        kept: with kdcore's setting of malloc, which anybody may have.
    """
    from kdcore.training.device import kept_memory

    torch.backends.cudnn.benchmark = True
    if kept:
        STAGE.enter_context(kept_memory())
    images, labels = (part.to(setting.device) for part in pictures(setting))
    mean, std = (torch.tensor(v, device=setting.device).view(3, 1, 1) * 255 for v in (MEAN, STD))
    layout: Any = torch.channels_last
    teacher = model(setting.teacher, setting).eval().to(memory_format=layout)
    student = model(setting.student, setting).train().to(memory_format=layout)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    if compiled:
        teacher.compile()
        student.compile()
    kind = torch.device(setting.device).type

    def step() -> None:
        chosen = torch.randint(len(labels), (setting.batch,), device=setting.device)
        inputs = F.pad((images[chosen] - mean) / std, [4] * 4)
        top, left = torch.randint(0, 9, (2,)).tolist()  # one crop and one flip for the whole batch, as is often seen
        inputs = inputs[:, :, top : top + SIDE, left : left + SIDE]
        inputs = inputs.flip(3) if torch.rand(()) < 0.5 else inputs
        inputs, target = inputs.contiguous(memory_format=torch.channels_last), labels[chosen]
        with torch.autocast(kind, torch.bfloat16, enabled=setting.precision == "bfloat16"):
            with torch.no_grad():
                taught = teacher(inputs) if teach else None
            logits = student(inputs)
        if taught is None:
            loss = F.cross_entropy(logits.float(), target)
        else:
            loss = careful_a(logits, taught, target, OBJECTIVE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


# -- kdcore


class KdcoreStep:
    """A step of a stage of the framework, as its loop runs it: meters, knobs, stopwatch and log included."""

    def __init__(self, setting: Setting, *, cache: bool = False, compiled: bool = True) -> None:
        from kdcore.training import device, loop
        from kdcore.training.compiled import fresh_graphs

        place = device.resolve(setting.device)
        STAGE.enter_context(device.sandbox(place, setting.threads))  # as around a stage
        STAGE.enter_context(fresh_graphs(compiled))
        self.session = open_stage(setting, cache, compiled)
        self.session.begin_tick()
        self.loop, self.clock = loop, loop.Clock(self.session)

    def __call__(self) -> None:
        self.loop._step(self.session)
        if self.session.step % self.session.job.settings.log_every == 0:
            self.loop._log(self.session, self.clock)

    def filling(self) -> float | None:
        """Images a second of making a view of the cache anew, its files and its check included; None without one."""
        from kdcore.store import Store

        session = self.session
        if session.stage.data.cache is None:
            return None
        session.store = Store(session.store.root / "again")
        for learner in session.storable:
            learner.cached = None
        start = time.perf_counter()
        session.begin_tick()
        return len(session.splits.train) / (time.perf_counter() - start)


def open_stage(setting: Setting, cache: bool, compiled: bool) -> Any:
    import kdcore
    from kdcore.executor import DataCache
    from kdcore.job import Settings
    from kdcore.keys import Keys
    from kdcore.plugins import load_plugins
    from kdcore.store import Store
    from kdcore.training.session import open_session

    host = load_plugins()
    load = DataCache(host.catalog)
    settings = Settings(
        store=setting.folder, device=setting.device, threads=setting.threads, precision=setting.precision,
        channels_last=True, compile=compiled,
    )  # fmt: skip
    recipe = {
        "data": {
            "name": "synthetic", "samples": setting.samples, "test_samples": 100, "classes": CLASSES, "size": SIDE,
            "batch_size": setting.batch, "shift": 4, "flip": True, "drop_last": True, "monitor": 0.02,
        },
        "teacher": {"model": setting.teacher},
        "student": {"model": setting.student},
        "train": {"epochs": 1000, "optimizer": {"name": "sgd", "weight_decay": 5e-4, "nesterov": True}},
        "objective": [{"loss": "cross_entropy"}, {"loss": "dkd"}],
    }  # fmt: skip
    if cache:
        recipe["cache"] = {"views": 1}
    view, _ = kdcore_recipe(recipe, host)
    learner = kdcore.Member(view.student, terms=view.objective, optimizer=view.optimizer)
    members = {f"student{n}": learner for n in range(setting.students)} | {"teacher": kdcore.Member(view.teacher)}
    stage = kdcore.Stage("bench", members, view.data, view.epochs)
    keys = Keys(host.catalog, 0, settings, lambda spec: str(load(spec).fingerprint))
    store = Store(setting.folder)
    return open_session(keys.job(stage), host.catalog, load(stage.data), store, lambda event: None, {})


def kdcore_recipe(recipe: dict[str, Any], host: Any) -> Any:
    from kdcore.recipe import compile_recipe, load

    return compile_recipe(load(recipe), host.catalog)


KEPT = "ten lines, compiled, kept memory"
WAYS: dict[str, Way] = {
    "published": published,
    "torchdistill": torchdistill,
    "ten lines": ten_lines,
    "ten lines, compiled": lambda setting: ten_lines(setting, compiled=True),
    KEPT: lambda setting: ten_lines(setting, compiled=True, kept=True),
    "ten lines, student alone": lambda setting: ten_lines(setting, teach=False),
    "live, eager": lambda setting: KdcoreStep(setting, compiled=False),
    "live": KdcoreStep,
    "cached": lambda setting: KdcoreStep(setting, cache=True),
}
NEEDS = {"published": "torchvision.transforms", "torchdistill": "torchdistill.core.distillation"}


# -- a process


def main() -> None:
    setting = Setting(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(setting.threads)
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            answer(setting, answers)
        except Exception as error:
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(json.dumps({"ended": what[:200]}), file=answers, flush=True)
            raise


def answer(setting: Setting, answers: TextIO) -> None:
    step, steps = WAYS[setting.way](setting), 1
    for line in sys.stdin:
        steps = int(line)
        print(json.dumps(timed(step, steps, setting.device)), file=answers, flush=True)
    print(json.dumps(costs(step, steps, setting.device)), file=answers, flush=True)


if __name__ == "__main__":
    main()
