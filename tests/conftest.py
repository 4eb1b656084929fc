"""What tests of recipes, plugins and the command line share."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from kdcore.plugins import PluginHost, load_plugins

# how long an example takes says how busy the machine is
settings.register_profile("kdcore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kdcore")

TINY = """
seed = 0
threads = 1
device = "cpu"
data    = { name = "digits", batch_size = 256 }
teacher = { model = "mlp", size = 2 }
student = { model = "mlp", size = 1 }
train   = { epochs = 1 }
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """A file that left more threads than it found would have later ones, in any order, compute and fork otherwise."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


class Tell:
    """Names a test that failed at once: a run that is ended from outside prints no summary."""

    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"{report.when} of {report.nodeid}: {str(report.longrepr).splitlines()[-1]}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):
        config.pluginmanager.register(Tell(terminal))


@pytest.fixture(scope="module")
def host() -> PluginHost:
    return load_plugins()


@pytest.fixture(scope="module")
def compiled_op() -> None:
    """Skips a module where the compiled op is not there, or fails it where it must be (KDCORE_REQUIRE_EXT=1)."""
    from kdcore.losses._extension import why_not

    if problem := why_not("cpu"):
        refuse = pytest.fail if os.environ.get("KDCORE_REQUIRE_EXT") == "1" else pytest.skip
        refuse(f"the compiled op is not there: {problem}")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe that trains in a fraction of a second, and what is added to it."""

    def write(extra: str = "") -> Path:
        path = tmp_path / "tiny.toml"
        path.write_text(TINY + textwrap.dedent(extra), encoding="utf-8")
        return path

    return write


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Runs ``kdcore`` in this process, in an empty folder."""
    from kdcore.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        code = end.value.code
        return Done(0 if code is None else int(code), *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Done]:
    """Runs Python with these arguments in a process of its own, in an empty folder."""

    def run(*arguments: object, path: Path | str | None = None) -> Done:
        environment = {**os.environ, "COLUMNS": "160", **({"PYTHONPATH": str(path)} if path else {})}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def forget(tmp_path: Path) -> Iterator[None]:
    """Forgets what was imported from this test's folder."""
    yield
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def plugin_file(tmp_path: Path, forget: None) -> Callable[[str, str], Path]:
    """Writes a file for ``--plugin-file``."""

    def write(name: str, source: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return path

    return write


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None) -> Callable[..., Path]:
    """Installs a distribution by hand: a module, and a dist-info folder that names it. Gives the folder on sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write(name: str, source: str = "", *, version: str = "1.0", module: str = "", entry: str = "") -> Path:
        module = module or f"{name}_module"
        info = site / f"{name}_dist-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry or f"[kdcore]\n{name} = {module}\n")
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return site

    return write
