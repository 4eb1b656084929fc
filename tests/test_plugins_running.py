"""Plugins at work: observers cannot harm a run, errors name whose code they arose in, commands stay apart."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done

from kdcore.errors import PluginError
from kdcore.plugins import load_plugins

GOOD = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("acme", "nowhere_at_all:Loss", options="kdcore.options:Options", about="never imported")
"""

# ---------------------------------------------------------------- observers

RUN = {"id": "digits-0", "dir": "runs/digits-0", "seed": 0}
STAGE = {"key": "0" * 64, "name": "mlp-2 on labels", "members": {"teacher": "mlp-2"}, "length": 3}
NOSY = """
import kdcore
calls = []

@kdcore.hookimpl
def kdcore_epoch_finished(metrics, epoch):
    calls.append(epoch)
    for values in metrics.values():
        values["accuracy"] = 1.0
    raise ValueError("no disk")
"""


def test_observer_that_raises_is_muted_and_said_once(
    install: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    install("nosy", NOSY)
    host = load_plugins()
    metrics = {"student": {"accuracy": 0.5}}
    for epoch in (1, 2, 3):
        host.emit("kdcore_epoch_finished", run=RUN, stage=STAGE, epoch=epoch, metrics=metrics)
    assert sys.modules["nosy_module"].calls == [1]
    assert metrics == {"student": {"accuracy": 0.5}}  # observers see copies
    err = capsys.readouterr().err
    assert err.count("muted for this run") == 1
    assert "plugin nosy (nosy-dist 1.0): kdcore_epoch_finished raised ValueError: no disk, " in err
    assert "nosy_module.py line 10" in err


def test_observer_that_exits_does_not_end_the_run(install: Callable[..., Path]) -> None:
    install("nosy", NOSY.replace('raise ValueError("no disk")', "raise SystemExit(0)"))
    host = load_plugins()
    host.emit("kdcore_epoch_finished", run=RUN, stage=STAGE, epoch=1, metrics={"student": {}})
    assert "nosy" in host.muted


def test_strict_plugins_makes_an_observer_fatal(install: Callable[..., Path]) -> None:
    install("nosy", NOSY)
    host = load_plugins(strict=True)
    with pytest.raises(PluginError, match=r"plugin nosy \(nosy-dist 1\.0\): kdcore_epoch_finished raised ValueError"):
        host.emit("kdcore_epoch_finished", run=RUN, stage=STAGE, epoch=1, metrics={"student": {}})


def test_muted_observer_is_listed_in_the_result(
    install: Callable[..., Path], tiny: Callable[..., Path], cli: Callable[..., Done], tmp_path: Path
) -> None:
    install("nosy", NOSY)
    done = cli("run", tiny())
    assert done.code == 0
    assert done.err.count("it is muted for this run") == 1
    result = json.loads(next(tmp_path.glob("runs/tiny-*/result.json")).read_text())
    assert "kdcore_epoch_finished raised ValueError: no disk" in result["degraded"]["nosy"]
    assert cli("run", tiny("strategy = 'distill'"), "--set", "seed=1", "--strict-plugins").code == 3


# ---------------------------------------------------------------- errors inside plugins

WRONG = """
import kdcore
from kdcore import Term, Outcome
import torch

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("bad", Loss, options=kdcore.Options)
    registry.controller("bad", Controller, options=kdcore.Options)
    registry.strategy("bad", Strategy, options=kdcore.Options)
    registry.model("bad", model, options=kdcore.Options)

class Loss(torch.nn.Module):
    needs = frozenset()
    @classmethod
    def build(cls, shapes, options):
        return cls()
    def forward(self, own, other, batch):
        return [][0]  # loss

class Controller:
    needs = frozenset()
    def __init__(self, options):
        pass
    def decide(self, view):
        return [][0]  # controller
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass

class Strategy:
    def plan(self, run, options):
        yield run.label_only("teacher", run.teacher)
        return [][0]  # strategy

def model(options, data):
    return [][0]  # model
"""
NAMED = {
    "loss": '[[objective]]\nloss = "bad"',
    "controller": '[[controller]]\nname = "bad"',
    "strategy": '[strategy]\nname = "bad"',
    "model": "",
}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kind", NAMED)
def test_error_in_plugin_code_names_plugin_and_line_and_exits_3(
    kind: str, jobs: int, tiny: Callable[..., Path], cli: Callable[..., Done], plugin_file: Callable[..., Path]
) -> None:
    file = plugin_file("wrong_code", WRONG)
    line = next(number for number, text in enumerate(WRONG.splitlines(), 1) if text.endswith(f"# {kind}"))
    bad_model = ("--set", 'student={ model = "bad" }') if kind == "model" else ()
    done = cli("run", tiny(NAMED[kind]), "--plugin-file", file, "--jobs", jobs, *bad_model)
    assert done.code == 3, done.err
    assert f"in plugin wrong_code, {file} line {line}" in done.err
    assert "kdcore: a plugin failed: " in done.err
    assert "IndexError: list index out of range" in done.err
    assert "bug in kdcore" not in done.err


def test_plan_blames_a_strategy_too(
    tiny: Callable[..., Path], cli: Callable[..., Done], plugin_file: Callable[..., Path]
) -> None:
    file = plugin_file("wrong_plan", WRONG)
    done = cli("plan", tiny(NAMED["strategy"]), "--plugin-file", file)
    assert done.code == 3
    assert f"in plugin wrong_plan, {file} line" in done.err


def test_plugin_that_exits_is_no_success(
    tiny: Callable[..., Path], cli: Callable[..., Done], plugin_file: Callable[..., Path]
) -> None:
    file = plugin_file("quitter", WRONG.replace("return [][0]  # strategy", "raise SystemExit(0)"))
    done = cli("run", tiny(NAMED["strategy"]), "--plugin-file", file)
    assert done.code == 3
    assert f"a plugin: it called sys.exit(0), {file} line" in done.err


def test_target_that_cannot_be_imported_is_blamed(
    install: Callable[..., Path], tiny: Callable[..., Path], cli: Callable[..., Done]
) -> None:
    install("acme", GOOD.replace(', options="kdcore.options:Options"', ""))
    done = cli("run", tiny('[[objective]]\nloss = "acme"'))
    assert done.code == 3
    assert "No module named 'nowhere_at_all'" in done.err
    assert "in plugin acme (acme-dist 1.0), loading loss 'acme/acme'" in done.err


def test_validator_that_raises_blames_its_plugin(install: Callable[..., Path]) -> None:
    install(
        "acme",
        """
        import kdcore, pydantic

        class Odd(kdcore.Options):
            x: int = 0

            @pydantic.field_validator("x")
            @classmethod
            def check(cls, value):
                return {}[value]

        @kdcore.hookimpl
        def kdcore_register(registry):
            registry.loss("odd", "a:b", options=Odd)
        """,
    )
    entry = load_plugins().catalog.find("loss", "odd")
    with pytest.raises(KeyError) as error:
        entry.check({"x": 1}, "objective[0]")
    assert error.value.__notes__ == ["in plugin acme (acme-dist 1.0), checking the options of loss 'acme/odd'"]


# ---------------------------------------------------------------- commands of plugins

COMMANDS = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.command("hello", "{module}:hello", about="greets")
    registry.command("run", "{module}:hello", about="shadows nothing")
    registry.command("gone", "no_such_module_at_all:x", about="cannot be imported")

def hello(name: str = "you", loud: bool = False):
    print(f"hello {name}{'!' if loud else ''}")
"""


def test_command_of_a_plugin_runs_and_is_listed(install: Callable[..., Path], cli: Callable[..., Done]) -> None:
    install("acme", COMMANDS.replace("{module}", "acme_module"))
    assert cli("hello", "--name", "world", "--loud").out == "hello world!\n"
    assert cli("acme/run").out == "hello you\n"  # a built-in command keeps its name
    text = cli("--help").out
    assert re.search(r"hello +greets", text)
    assert re.search(r"acme/run +shadows nothing", text)


def test_broken_command_fails_only_when_called(install: Callable[..., Path], cli: Callable[..., Done]) -> None:
    install("acme", COMMANDS.replace("{module}", "acme_module"))
    assert cli("--help").code == 0
    done = cli("gone")
    assert done.code == 3
    assert "in plugin acme (acme-dist 1.0), loading command 'acme/gone'" in done.err


def test_two_plugins_with_one_command_are_told_apart(install: Callable[..., Path], cli: Callable[..., Done]) -> None:
    install("acme", COMMANDS.replace("{module}", "acme_module"))
    install("beta", COMMANDS.replace("{module}", "beta_module"))
    assert cli("hello").code == 2
    assert cli("beta/hello").out == "hello you\n"
