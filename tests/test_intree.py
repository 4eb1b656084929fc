"""The project's own plugins stand on the public API alone, so what a third party can do is what they can do."""

from __future__ import annotations

import ast
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Done

import kdcore
import kdcore.losses

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = sorted(path for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").is_file())
FILES = [file for plugin in PLUGINS for file in sorted(plugin.rglob("*.py"))]
PUBLIC = {"kdcore": kdcore, "kdcore.losses": kdcore.losses}
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["kdcore"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "plugins").as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """(module, name, level) of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name, node.level) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_plugin_imports_only_what_kdcore_exports(file: Path) -> None:
    tree = ast.parse(file.read_text())
    for module, name, level in imports(tree):
        top = module.partition(".")[0]
        if level:
            depth = len(file.relative_to(ROOT / "plugins").parts) - 1
            assert level <= depth, f"line imports {module} from outside of its plugin"
        elif top == "kdcore":
            assert module in PUBLIC, f"{module} is no public module"
            assert not name or name in PUBLIC[module].__all__, f"{module} does not export {name}"
        elif top.startswith("kdcore"):
            assert top == file.relative_to(ROOT / "plugins").parts[0], f"imports another plugin, {module}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_plugin_uses_only_attributes_that_kdcore_exports(file: Path) -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kdcore"
    }
    assert used <= set(kdcore.__all__)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_plugin_reaches_kdcore_by_no_other_way(file: Path) -> None:
    """Neither ``importlib`` nor a target in text names a module of kdcore or of another plugin."""
    own = file.relative_to(ROOT / "plugins").parts[0]
    tree = ast.parse(file.read_text())
    assert "importlib" not in [module for module, _, _ in imports(tree)]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    targets = [text for text in texts if text.startswith("kdcore") and ":" in text and " " not in text]
    assert all(target.partition(":")[0].partition(".")[0] == own for target in targets)


def test_every_plugin_has_its_own_entry_point() -> None:
    assert sorted(ENTRY_POINTS.values()) == [plugin.name for plugin in PLUGINS]
    assert all(module == f"kdcore_{name}" for name, module in ENTRY_POINTS.items())


def test_every_plugin_is_packaged() -> None:
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert {plugin.name: f"plugins/{plugin.name}" for plugin in PLUGINS}.items() <= folders.items()


@pytest.mark.parametrize("plugin", PLUGINS, ids=name_of)
def test_plugin_says_what_it_is_and_which_hooks_it_knows(plugin: Path) -> None:
    tree = ast.parse((plugin / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    names = [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]  # type: ignore[attr-defined]
    assert "KDCORE_HOOKS" in names


LIST = """
import sys
from kdcore.plugins import load_plugins
host = load_plugins(block=sys.argv[1:])
assert not host.broken, host.broken
origin = host.origins["elsewhere"]
entries = [e for kind in host.catalog.entries for e in host.catalog.all(kind) if e.origin.plugin == "elsewhere"]
assert entries or host.manager.get_hookcallers(host.manager.get_plugin("elsewhere"))
assert "torch" not in sys.modules
for entry in entries[:10]:
    entry.options_class()
assert "torch" not in sys.modules
for entry in entries[:10]:
    entry.load()
print(origin, *origin.files)
"""


@pytest.mark.parametrize("plugin", PLUGINS, ids=name_of)
def test_plugin_works_from_another_place_under_another_name(
    plugin: Path, tmp_path: Path, shell: Callable[..., Done]
) -> None:
    site = tmp_path / "site"
    copy = f"third_party_{plugin.name}"
    shutil.copytree(plugin, site / copy, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "elsewhere_dist-7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere-dist\nVersion: 7.0\n")
    (info / "entry_points.txt").write_text(f"[kdcore]\nelsewhere = {copy}\n")
    done = shell("-c", LIST, *ENTRY_POINTS, path=site)
    assert done.code == 0, done.err
    assert done.out == f"elsewhere (elsewhere-dist 7.0) {site / copy}\n"


def test_nothing_of_a_plugin_is_imported_by_kdcore() -> None:
    own = {plugin.name for plugin in PLUGINS}
    for file in sorted((ROOT / "kdcore").rglob("*.py")):
        tops = {module.partition(".")[0] for module, _, level in imports(ast.parse(file.read_text())) if not level}
        assert not tops & own, file.name
