"""What surrounds a run changes nothing in it: observers, an unwritable home, a network that is not there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from conftest import Done
from small import file_hash, make_run, weights

from kdcore import hookspecs
from kdcore.plugins import load_plugins
from kdcore.testing.faults import no_network, unwritable_home

HOOKS = [name for name in vars(hookspecs) if name.startswith("kdcore_") and name != "kdcore_register"]
OBSERVER = """
import random

import kdcore
import numpy
import torch

calls = {}

def draw(name):
    calls[name] = calls.get(name, 0) + 1
    torch.rand(3), numpy.random.rand(3), random.random()
    torch.manual_seed(1), numpy.random.seed(2), random.seed(3)
"""
HOOK = """
@kdcore.hookimpl
def {name}({arguments}):
    draw("{name}")
"""


def observers(folder: Path, count: int) -> list[Path]:
    """Plugins that implement every observer hook, draw random numbers in it and seed all generators."""
    text = OBSERVER
    for name in HOOKS:
        arguments = getattr(hookspecs, name).__code__
        text += HOOK.format(name=name, arguments=", ".join(arguments.co_varnames[: arguments.co_argcount]))
    files = [folder / f"observer_{number}.py" for number in range(count)]
    for file in files:
        file.write_text(text)
    return files


def random_state() -> tuple[bytes, object, object]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), str(numpy.random.get_state())


def test_ten_observers_that_draw_and_seed_change_no_weight_no_curve_and_no_random_state(tmp_path):
    sets = ["execute.checkpoint_seconds=0", "student.model=cnn", "student.size=1"]
    results = {}
    for name, count in (("none", 0), ("ten", 10)):
        (tmp_path / name).mkdir()
        host = load_plugins(files=observers(tmp_path / name, count))
        before = random_state()
        results[name] = make_run(tmp_path / name, sets=sets, host=host).execute()
        assert not count or random_state() == before  # the first run imports modules, of which one draws
        assert not host.muted
        own = [host.manager.get_plugin(plugin) for plugin in host.origins if plugin.startswith("observer_")]
        assert len(own) == count  # others may be installed
        for plugin in own:
            assert set(plugin.calls) == set(HOOKS)
    assert weights(tmp_path / "none") == weights(tmp_path / "ten")
    assert weights(tmp_path / "none", "teacher") == weights(tmp_path / "ten", "teacher")
    curves = [
        {name: member["curve"] for stage in result["stages"] for name, member in stage["members"].items()}
        for result in results.values()
    ]
    assert curves[0] == curves[1]


# ---------------------------------------------------------------- home and network

BLOCKED = """
import sys
from kdcore.cli import main
from kdcore.testing.faults import no_network
with no_network() as tried:
    try:
        main(sys.argv[1:])
    finally:
        assert not tried, tried
"""


def test_a_run_needs_neither_a_home_nor_a_network(
    cli: Callable[..., Done], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    cli("run", tiny(), "--root", "other")
    with unwritable_home(), no_network() as tried:
        done = cli("run", tiny())
    assert done.code == 0, done.err
    assert not tried
    assert len({file_hash(path) for path in tmp_path.glob("*/tiny-*/student.safetensors")}) == 1


@pytest.mark.long
def test_a_process_needs_neither_from_its_first_import_on(
    shell: Callable[..., Done], tiny: Callable[..., Path], tmp_path
):
    with unwritable_home():
        done = shell("-c", BLOCKED, "run", tiny())
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    folder = next(tmp_path.glob("runs/tiny-*"))
    assert json.loads((folder / "result.json").read_bytes())["degraded"] == {}


def test_a_blocked_network_refuses_and_tells_who_tried():
    import socket

    with no_network() as tried, pytest.raises(OSError, match="Network is unreachable"):
        socket.create_connection(("example.org", 80))
    with no_network() as tried, pytest.raises(OSError, match="Network is unreachable"):
        socket.socket(socket.AF_INET)
    assert len(tried) == 1
