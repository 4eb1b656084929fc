"""A plugin that fails in any kind of thing, when it is built or when it is used, is named with its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Done

EVERY_KIND = '''
import dataclasses
import os

import kdcore
import torch
from kdcore.data.source import EpochSource
from kdcore.executor import LocalExecutor
from kdcore.training.step import Distill
from torch import nn


def fail(what):
    """Raises, or gives something of a wrong type, where the test asks for it."""
    if os.environ.get("ACME_RAISES") == what:
        raise IndexError(what)  # here
    return os.environ.get("ACME_WRONG") == what


@kdcore.hookimpl
def kdcore_register(registry):
    for kind in ("loss", "model", "dataset", "source", "transform", "strategy", "controller", "step", "schedule",
                 "optimizer", "metric", "executor", "command"):
        getattr(registry, kind)("all", globals()[kind])


class loss(nn.Module):
    needs = frozenset({"logits"})

    @classmethod
    def build(cls, shapes, options):
        return None if fail("loss build") else cls()

    def forward(self, student, teacher, batch):
        return None if fail("loss call") else (student.logits - teacher.logits.detach()).pow(2).mean()


class Net(nn.Sequential):
    def forward(self, x):
        return None if fail("model call") else super().forward(x)


def model(options, data):
    return None if fail("model build") else Net(nn.Flatten(), nn.Linear(4, data.classes))


def dataset(options):
    if fail("dataset build"):
        return None
    generator = torch.Generator().manual_seed(0)
    parts = [kdcore.Split(torch.randn(40, 1, 2, 2, generator=generator), torch.arange(40) % 2) for _ in range(2)]
    return kdcore.Dataset(*parts, 2)


class source(EpochSource):
    Options = kdcore.Options

    def __init__(self, options, context):
        fail("source build")
        super().__init__(options, context)

    def batch(self, step):
        return None if fail("source call") else super().batch(step)


class Part:
    def __init__(self, options):
        fail(f"{type(self).__name__} build")


class transform(Part):
    def __call__(self, batch, random):
        return None if fail("transform call") else batch


class strategy:
    class Options(kdcore.Options):
        step: bool = False

    def plan(self, run, options):
        fail("strategy build")
        first = run.label_only("teacher", run.teacher)
        yield 7 if fail("strategy call") else first
        second = run.distilled(run.student, first["teacher"])
        if options.step:
            second = dataclasses.replace(second, step=kdcore.Spec("all"))
        yield second
        return kdcore.Outcome(second["student"], first["teacher"])


class controller(Part):
    needs = frozenset({"all"})

    def decide(self, view):
        return [7] if fail("controller call") else []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class step(Distill):
    def __init__(self, options):
        fail("step build")

    def __call__(self, ctx, batch):
        fail("step call")
        super().__call__(ctx, batch)


def schedule(epoch, length, options):
    return None if fail("schedule call") else 1.0


class SGD(torch.optim.SGD):
    def step(self, closure=None):
        fail("optimizer call")
        return super().step(closure)


def optimizer(parameters, lr, options):
    return None if fail("optimizer build") else SGD(parameters, lr=lr)


def metric(student, teacher, target):
    return None if fail("metric call") else target.float()


class executor(LocalExecutor):
    def __init__(self, options, context, jobs):
        fail("executor build")
        super().__init__(options, context, jobs)

    def execute(self, jobs, emit):
        fail("executor call")
        yield from super().execute(jobs, emit)


def command():
    fail("command call")
'''
RECIPE = """
threads = 1
device = "cpu"
data = { name = "all", batch_size = 18, source = "all", transforms = ["all"] }
teacher = { model = "all" }
student = { model = "all" }
train = { epochs = 1, optimizer = "all", schedule = "all" }
strategy = { name = "all" }
controller = ["all"]
[[objective]]
loss = "cross_entropy"
[[objective]]
loss = "all"
"""
PLACES = (
    "loss build", "loss call", "model build", "model call", "dataset build", "source build", "source call",
    "transform build", "transform call", "strategy build", "strategy call", "controller build", "controller call",
    "step build", "step call", "schedule call", "optimizer build", "optimizer call", "metric call", "executor build",
    "executor call", "command call",
)  # fmt: skip
RETURNS = (
    "loss build", "loss call", "model build", "model call", "dataset build", "source call", "transform call",
    "strategy call", "controller call", "schedule call", "optimizer build", "metric call",
)  # fmt: skip


@pytest.fixture
def acme(
    install: Callable[..., Path], cli: Callable[..., Done], tmp_path: Path
) -> Iterator[Callable[..., tuple[Done, Path]]]:
    """Runs the recipe that names a thing of almost every kind, or the command."""
    site = install("acme", EVERY_KIND, version="1.2.3")
    (tmp_path / "all.toml").write_text(RECIPE)

    def run(place: str = "") -> tuple[Done, Path]:
        # only where it is its turn: a plugin's executor or step is in the way of every error, and would be named for it
        own = {"executor": ("--set", "execute.name=all"), "step": ("--set", "strategy.step=true")}
        kind = place.partition(" ")[0]
        done = cli("all") if kind == "command" else cli("run", "all.toml", *own.get(kind, ()))
        return done, site / "acme_module.py"

    return run


@pytest.mark.parametrize("place", PLACES)
def test_what_raises_is_named_with_plugin_distribution_version_and_line(
    place: str, acme: Callable[..., tuple[Done, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_RAISES", place)
    done, file = acme(place)
    line = next(number for number, text in enumerate(EVERY_KIND.splitlines(), 1) if text.endswith("# here"))
    assert done.code == 3, done.err
    assert f"kdcore: a plugin failed: IndexError: {place}" in done.err
    assert f"in plugin acme (acme-dist 1.2.3), {file} line {line}" in done.err


@pytest.mark.parametrize("place", RETURNS)
def test_what_gives_a_wrong_type_is_named_and_no_bug_of_kdcore(
    place: str, acme: Callable[..., tuple[Done, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_WRONG", place)
    done, _ = acme(place)
    assert done.code in (3, 5, 8), done.err
    assert "acme" in done.err or "'all'" in done.err
    assert "bug in kdcore" not in done.err


def test_the_same_plugin_runs_where_it_does_not_fail_and_other_recipes_pass_where_it_does(
    acme: Callable[..., tuple[Done, Path]], cli: Callable[..., Done], tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for place in ("step", "executor", "command"):
        done, _ = acme(place)
        assert done.code == 0, done.err
    monkeypatch.setenv("ACME_RAISES", "model build")
    assert cli("run", tiny()).code == 0
