"""Models, a step, a controller and policies for tests of memory: a batch above a limit raises as an allocator would."""

from __future__ import annotations

import os
import weakref

import torch
from torch import nn

import kdcore

FAILED: list[int] = []  # sizes of the batches that were refused
ALIVE: list[int] = []  # how many models there were at each refusal
MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@kdcore.hookimpl
def kdcore_register(registry):
    registry.model("tight", build)
    registry.model("tight-norm", lambda options, data: build(options, data, nn.BatchNorm1d(16)))
    registry.step("whole", Whole)
    registry.strategy("whole", WholeStrategy)
    registry.controller("normalise", Normalise)
    registry.failure_policy("told", Told)
    registry.failure_policy("odd", Odd)


def limits() -> dict[bool, int]:
    """The largest batch in training and in evaluation: KDCORE_TIGHT = "40,512"."""
    train, evaluation = os.environ.get("KDCORE_TIGHT", "100000,100000").split(",")
    return {True: int(train), False: int(evaluation)}


class Tight(nn.Sequential):
    def forward(self, images):
        if len(images) > limits()[self.training]:
            FAILED.append(len(images))
            ALIVE.append(len(MODELS))
            if os.environ.get("KDCORE_TIGHT_CPU"):
                torch.empty(10**15)
            raise torch.OutOfMemoryError(f"tried to allocate for {len(images)} images")
        return super().forward(images)


def build(options, data, *layers):
    model = Tight(nn.Flatten(), nn.Linear(64, 16), *layers, nn.ReLU(), nn.Linear(16, data.classes))
    MODELS.add(model)
    return model


class Whole:
    """A step that knows nothing of pieces."""

    Options = kdcore.Options

    def __init__(self, options):
        pass

    def __call__(self, ctx, batch):
        for name in ctx.trained:
            ctx.backward(name, ctx.loss(name, ctx.forward(name, batch.inputs), {}, batch))
            ctx.apply(name)


class WholeStrategy:
    Options = kdcore.Options

    def plan(self, run, options):
        import dataclasses

        stage = dataclasses.replace(run.label_only("student", run.student), step=kdcore.Spec("whole"))
        yield stage
        return kdcore.Outcome(stage["student"])


class Normalise:
    """Wants class statistics from the second tick on."""

    Options = kdcore.Options
    needs = frozenset()

    def __init__(self, options):
        pass

    def decide(self, view):
        return [kdcore.Set("student.kd.normalize", "class", "it is time")] if view.tick == 1 else []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Told:
    """Keeps what it was told, and asks for as many pieces as its option says."""

    class Options(kdcore.Options):
        pieces: int = 8

    failures: list[kdcore.Failure] = []  # noqa: RUF012

    def __init__(self, options):
        self.options = options

    def decide(self, failure):
        self.failures.append(failure)
        return kdcore.Retry(self.options.pieces)


class Odd:
    Options = kdcore.Options

    def __init__(self, options):
        pass

    def decide(self, failure):
        return "again"
