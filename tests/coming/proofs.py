"""Throw-away plugins that stand for what comes: roles that swap, a generator and a critic, a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdcore

NOISE = 8


@kdcore.hookimpl
def kdcore_register(registry):
    registry.strategy("swap", SwapStrategy)
    registry.controller("swap", Swap)
    registry.strategy("two-player", TwoPlayer)
    registry.step("two-player", TwoPlayerStep)
    registry.model("generator", build_generator)
    registry.model("critic", build_critic)
    registry.loss("fool", Fool)
    registry.loss("agree", Agree)
    registry.loss("tell-apart", TellApart)
    registry.strategy("stream", StreamStrategy)
    registry.source("stream", Stream)
    registry.controller("harder", Harder)


# ---------------------------------------------------------------- role swap by decisions


class SwapStrategy:
    """The student learns from a trained teacher; then the teacher from the student."""

    Options = kdcore.Options

    def plan(self, run, options):
        first = run.label_only("teacher", run.teacher)
        yield first
        stage = swap(run, first["teacher"])
        yield stage
        return kdcore.Outcome(stage["student"], first["teacher"])


def swap(run: kdcore.RunView, teacher: kdcore.ResultRef) -> kdcore.Stage:
    a = _player(run, run.student, "teacher", 1.0)
    b = _player(run, run.teacher, "student", 0.0, init=teacher)
    stage = kdcore.Stage("swap", {"student": a, "teacher": b}, run.data, run.epochs, seed=run.seed)
    return dataclasses.replace(stage, controllers=(kdcore.Spec("swap"),))


def _player(run, model, source, weight, init=None):
    labels = kdcore.Term("cross_entropy", None, weight)
    kd = kdcore.Term("kd", source, weight)
    return kdcore.Member(model, init, (labels, kd), run.optimizer)


class Swap:
    """Exchanges who learns and who teaches every second tick."""

    Options = kdcore.Options
    needs = frozenset({"accuracy"})

    def __init__(self, options):
        self.learner = "student"

    @staticmethod
    def example_stage(run):
        return swap(run, run.label_only("teacher", run.teacher)["teacher"])

    def decide(self, view: kdcore.TickView) -> Iterable[kdcore.Decision]:
        if view.now("student") is None or view.now("teacher") is None:
            raise AssertionError("a controller sees the one that is frozen too")
        if view.tick % 2:
            return []
        old, new = self.learner, "teacher" if self.learner == "student" else "student"
        self.learner = new
        weights = {old: 0.0, new: 1.0}
        return [
            kdcore.Set(f"{member}.{term}.weight", weight, "every second tick")
            for member, weight in weights.items()
            for term in ("cross_entropy", "kd")
        ]

    def state_dict(self):
        return {"learner": self.learner}

    def load_state_dict(self, state: Mapping[str, Any]):
        self.learner = state["learner"]


# ---------------------------------------------------------------- a two-player step


class TwoPlayer:
    """A generator fools a critic and pleases a frozen teacher; then an ordinary distillation."""

    Options = kdcore.Options

    def plan(self, run, options):
        teacher = run.label_only("teacher", run.teacher)
        yield teacher
        yield players(run, teacher["teacher"])
        student = run.distilled(run.student, teacher["teacher"])
        yield student
        return kdcore.Outcome(student["student"], teacher["teacher"])


def players(run: kdcore.RunView, teacher: kdcore.ResultRef) -> kdcore.Stage:
    pleases = (
        kdcore.Term("fool", "critic", 1.0, through=True),
        kdcore.Term("agree", "teacher", 0.5, through=True),
    )
    members = {
        "generator": kdcore.Member(kdcore.ModelRef("generator"), None, pleases, run.optimizer),
        "critic": kdcore.Member(
            kdcore.ModelRef("critic"), None, (kdcore.Term("tell-apart", None),), run.optimizer, ema=0.9
        ),
        "teacher": kdcore.Member(run.teacher, teacher),
    }
    return kdcore.Stage("players", members, run.data, run.epochs, step=kdcore.Spec("two-player"), seed=run.seed)


class TwoPlayerStep:
    Options = kdcore.Options

    def __init__(self, options):
        self.contrast = torch.ones(())  # a running mean, which a resume must not lose

    def state_dict(self):
        return {"contrast": self.contrast}

    def load_state_dict(self, state):
        self.contrast = state["contrast"]

    def __call__(self, ctx: kdcore.StepContext, batch: kdcore.Batch) -> None:
        noise = torch.randn(len(batch.target), NOISE, generator=ctx.generator("generator"), device=ctx.device)
        fake = ctx.forward("generator", noise)
        judges = {
            "critic": ctx.forward("critic", fake.logits),
            "teacher": ctx.forward("teacher", fake.logits, through=True),
        }
        ctx.backward("generator", ctx.loss("generator", fake, judges, batch))
        ctx.apply("generator")
        both = ctx.forward("critic", torch.cat([batch.inputs, fake.logits.detach()]))
        self.contrast = 0.9 * self.contrast + 0.1 * both.logits.detach().std()
        ctx.backward("critic", ctx.loss("critic", both, {}, batch) / (1 + self.contrast))
        ctx.apply("critic")


class Generator(nn.Sequential):
    classifies = False


def build_generator(options, data: kdcore.DataInfo) -> nn.Module:
    channels, height, width = data.shape
    out = nn.Linear(32, channels * height * width)
    return Generator(nn.Linear(NOISE, 32), nn.ReLU(), nn.Dropout(0.2), out, nn.Unflatten(1, data.shape))


def build_critic(options, data: kdcore.DataInfo) -> nn.Module:
    channels, height, width = data.shape
    return Generator(nn.Flatten(), nn.Linear(channels * height * width, 32), nn.ReLU(), nn.Linear(32, 1))


class Fool(nn.Module):
    needs = frozenset({"logits"})

    @classmethod
    def build(cls, shapes, options):
        return cls()

    def forward(self, student, teacher, batch) -> Tensor:
        return F.softplus(-teacher.logits).mean()


class Agree(Fool):
    """The generator's images should be classified as the batch's labels."""

    needs = frozenset({"logits", "target"})

    def forward(self, student, teacher, batch) -> Tensor:
        return F.cross_entropy(teacher.logits, batch.target)


class TellApart(Fool):
    def forward(self, student, teacher, batch) -> Tensor:
        real, fake = student.logits.chunk(2)
        return (F.softplus(-real) + F.softplus(fake)).mean()


# ---------------------------------------------------------------- a stream with a tick every 50 steps


class StreamStrategy:
    """Steps of an endless stream instead of epochs."""

    Options = kdcore.Options

    def plan(self, run, options):
        teacher = run.label_only("teacher", run.teacher)
        yield teacher
        stage = stream(run, teacher["teacher"])
        yield stage
        return kdcore.Outcome(stage["student"], teacher["teacher"])


def stream(run: kdcore.RunView, teacher: kdcore.ResultRef) -> kdcore.Stage:
    stage = run.distilled(run.student, teacher)
    data = dataclasses.replace(stage.data, source=kdcore.Spec("stream"))
    return dataclasses.replace(
        stage, name="stream", data=data, tick=50, length=200, controllers=(kdcore.Spec("harder"),)
    )


class Stream:
    """Training images drawn with replacement, with noise of a strength that a knob sets."""

    Options = kdcore.Options

    def __init__(self, options, context: kdcore.SourceContext):
        self.context = context
        self.steps_per_epoch = 0
        self.knobs: dict[str, Any] = {"difficulty": 0.1}

    def batch(self, step: int) -> kdcore.Batch:
        train, size = self.context.data.split, self.context.batch_size
        generator = torch.Generator().manual_seed(kdcore.derive(self.context.seed, "stream", step))
        index = torch.randint(len(train), (size,), generator=generator)
        images = train.images[index].float() / 255
        noise = torch.randn(images.shape, generator=generator) * self.knobs["difficulty"]
        return kdcore.Batch(images + noise, train.labels[index], index, 0)


class Harder:
    """Raises the difficulty at every tick."""

    Options = kdcore.Options
    needs: frozenset[str] = frozenset({"kl"})

    def __init__(self, options):
        pass

    @staticmethod
    def example_stage(run):
        return stream(run, run.label_only("teacher", run.teacher)["teacher"])

    def decide(self, view):
        assert view.now("student", "kl") is not None
        return [kdcore.Set("data.difficulty", view.knobs["data.difficulty"] * 1.5, "tick by tick")]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
