"""The conformance checks pass what the project ships and fail what is broken."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import kdcore
from kdcore.plugins import load_plugins
from kdcore.testing import check_loss, check_model, check_strategy, run_view

CATALOG = load_plugins().catalog


def test_the_projects_strategies_conform():
    check_strategy(CATALOG.find("strategy", "distill").load())
    assistants = CATALOG.find("strategy", "assistants").load()
    check_strategy(assistants, assistants.Options(assistants=[{"model": "mlp", "size": 2}]))


@pytest.mark.parametrize("name", ["cross_entropy", "kd", "dkd"])
@pytest.mark.parametrize("normalize", ["none", "class", "instance"])
def test_the_projects_losses_conform(name, normalize):
    entry = CATALOG.find("loss", name)
    options = {} if name == "cross_entropy" else {"normalize": normalize}
    check_loss(entry.load(), entry.options_class()(**options))


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_the_projects_models_conform(name):
    entry = CATALOG.find("model", name)
    check_model(entry.load(), entry.options_class()(size=3))


class Restless:
    Options = kdcore.Options
    numbers = itertools.count()

    def plan(self, run, options):
        stage = run.label_only("teacher", kdcore.ModelRef("mlp", {"size": next(self.numbers)}))
        yield stage
        return kdcore.Outcome(stage["teacher"])


class Endless:
    Options = kdcore.Options

    def plan(self, run, options):
        while True:
            yield run.label_only("teacher", run.teacher)


class Empty:
    Options = kdcore.Options

    def plan(self, run, options):
        yield run.label_only("teacher", run.teacher)


@pytest.mark.parametrize(
    ("broken", "says"), [(Restless, "replay asks for other"), (Endless, "does it end"), (Empty, "not an Outcome")]
)
def test_a_broken_strategy_fails(broken, says):
    with pytest.raises(AssertionError, match=says):
        check_strategy(broken, view=run_view(epochs=2))


def broken_loss(formula):
    class Broken(nn.Module):
        needs = frozenset({"logits"})

        @classmethod
        def build(cls, shapes, options):
            return cls()

        def forward(self, student, teacher, batch):
            return formula(student.logits, teacher.logits)

    return Broken


@pytest.mark.parametrize(
    ("formula", "says"),
    [
        (lambda s, t: (s - t).pow(2).mean(1), "not a scalar"),
        (lambda s, t: s.exp().mean(), "it is inf"),
        (lambda s, t: (s[0] - t[0]).pow(2).mean(), "order of samples"),
        (lambda s, t: (s - t).abs().mean() + (s * 0).sqrt().mean(), "gradient is not finite"),
    ],
)
def test_a_broken_loss_fails(formula, says):
    with pytest.raises(AssertionError, match=says):
        check_loss(broken_loss(formula))


def test_a_broken_model_fails():
    class Noisy(nn.Module):
        taps = {"stage1": "nowhere"}  # noqa: RUF012

        def __init__(self, noise):
            super().__init__()
            self.layer, self.noise = nn.Linear(3 * 16 * 16, 7), noise

        def forward(self, x):
            return self.layer(x.flatten(1)) + self.noise * torch.randn(7)

    with pytest.raises(AssertionError, match="not deterministic"):
        check_model(lambda options, data: Noisy(1.0))
    with pytest.raises(AssertionError, match="names no submodule"):
        check_model(lambda options, data: Noisy(0.0))
    with pytest.raises(AssertionError, match="2 images of 8 classes"):
        check_model(lambda options, data: Noisy(0.0), classes=8)
