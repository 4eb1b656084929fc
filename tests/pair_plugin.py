"""A plugin for tests: two stages that need nothing of each other, with a loss that prints, fails or is slow."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time

import torch

import kdcore

HOLD = "KDCORE_TEST_HOLD"
"""Names a file. While it is there, a loss waits at its 60th step: no stage ends before a test did what it wants."""


@kdcore.hookimpl
def kdcore_register(registry):
    registry.strategy("pair", Pair)
    registry.loss("noisy", Noisy)


class Options(kdcore.Options):
    """What the loss does beside being zero."""

    fail: str = ""
    seconds: float = 0.0


class Pair:
    """Trains teacher and student, each on labels and on the loss above."""

    Options = Options

    def plan(self, run, options):
        noisy = kdcore.Term("noisy", None, 1.0, options.model_dump())
        view = dataclasses.replace(run, labels=(*run.labels, noisy))
        first, second = view.label_only("teacher", run.teacher), view.label_only("student", run.student)
        yield [first, second]
        return kdcore.Outcome(second["student"], first["teacher"])


class Noisy(torch.nn.Module):
    """Writes to standard output in every way that there is."""

    Options = Options
    needs = frozenset({"logits"})

    @classmethod
    def build(cls, shapes, options):
        print("printed by a plugin")
        os.write(1, b"written by a plugin\n")
        subprocess.run(["echo", "echoed by a plugin"], check=True)
        made = cls()
        made.options, made.steps = options, 0
        return made

    def forward(self, student, teacher, batch):
        if self.options.fail:
            raise ValueError(self.options.fail)
        time.sleep(self.options.seconds)
        self.steps += 1
        while self.steps == 60 and os.path.exists(os.environ.get(HOLD, "")):
            time.sleep(0.01)
        return student.logits.sum() * 0.0
