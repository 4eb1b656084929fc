"""Plugins from single files, and what counts as a plugin's code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore.plugins import load_plugins

GOOD = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("acme", "nowhere_at_all:Loss", options="kdcore.options:Options", about="never imported")
"""

# ---------------------------------------------------------------- single files


def test_plugin_file_is_loaded_under_its_stem(plugin_file: Callable[..., Path]) -> None:
    file = plugin_file(
        "my_single_file",
        GOOD + "\n    registry.loss('own', 'my_single_file:Own')\nclass Own:\n    needs = build = None",
    )
    host = load_plugins(files=[file, str(file)])  # twice is once
    entry = host.catalog.find("loss", "my_single_file/own")
    assert entry.origin.files == (file,)
    assert entry.load().__name__ == "Own"
    assert not host.broken


@pytest.mark.parametrize("stem", ["json", "torch", "antigravity", "kdcore"])
def test_plugin_file_never_replaces_a_module(stem: str, plugin_file: Callable[..., Path]) -> None:
    before = sys.modules.get(stem)
    file = plugin_file(stem, GOOD)
    assert f"a module {stem!r} exists already. Rename the file" in load_plugins(files=[file]).broken[stem]
    assert sys.modules.get(stem) is before


def test_plugin_file_with_the_name_of_a_plugin_leaves_that_one_alone(plugin_file: Callable[..., Path]) -> None:
    file = plugin_file("dskd", GOOD)
    host = load_plugins(files=[file])
    assert "its name is taken by dskd (kdcore" in host.broken[f"dskd {file}"]
    assert host.catalog.find("controller", "dskd/dskd").origin.distribution == "kdcore"
    host.require(["dskd"])


def test_broken_plugin_file_leaves_no_module_behind(plugin_file: Callable[..., Path]) -> None:
    file = plugin_file("my_broken_file", "x = 1\n1 / 0")
    reason = load_plugins(files=[file]).broken["my_broken_file"]
    assert reason == f"my_broken_file: ZeroDivisionError: division by zero, {file} line 2"
    assert "my_broken_file" not in sys.modules


# ---------------------------------------------------------------- identity of code


def test_code_is_the_whole_package_of_the_entry_point(install: Callable[..., Path]) -> None:
    site = install("acme", entry="[kdcore]\nacme = acme_pkg.hooks\n")
    package = site / "acme_pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "hooks.py").write_text(GOOD)
    (package / "losses.py").write_text("x = 1")
    before = load_plugins().origins["acme"].code()
    (package / "losses.py").write_text("x = 2")
    assert load_plugins().origins["acme"].code() != before


def test_code_is_also_the_module_that_a_target_names(install: Callable[..., Path]) -> None:
    site = install("acme", GOOD.replace("nowhere_at_all:Loss", "acme_impl:Loss"))
    (site / "acme_impl.py").write_text("class Loss: x = 1")
    first = load_plugins().origins["acme"]
    before = first.code()
    assert [path.name for path in first.files] == ["acme_impl.py", "acme_module.py"]
    assert "acme_impl" not in sys.modules
    (site / "acme_impl.py").write_text("class Loss: x = 2")
    assert load_plugins().origins["acme"].code() != before


def test_code_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    codes = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        file = folder / "my_moved_file.py"
        file.write_text(GOOD)
        codes.append(load_plugins(files=[file]).origins["my_moved_file"].code())
        del sys.modules["my_moved_file"]
    assert codes[0] == codes[1]
