"""docs/plugins.md and docs/plugin-reference.md: whole, and their code runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Done
from small import make_run
from test_readme import blocks

import kdcore
from kdcore import hookspecs
from kdcore.cli.app import build
from kdcore.deploy.export import export
from kdcore.plugins import load_plugins
from kdcore.registry import KINDS
from kdcore.scaffold import Package, write
from kdcore.testing import Subject, checks_of, verdicts

DOCS = Path(__file__).parents[1] / "docs"
GUIDE, REFERENCE = ((DOCS / name).read_text() for name in ("plugins.md", "plugin-reference.md"))
PACKAGE = Package("strategy", "kdcore-born-again")


# ---------------------------------------------------------------- nothing is left out


def signatures() -> Iterator[tuple[str, str]]:
    """Each hook with its arguments, as the reference writes them."""
    for name, hook in vars(hookspecs).items():
        if name.startswith("kdcore_"):
            yield name, ", ".join(hook.__code__.co_varnames[: hook.__code__.co_argcount])


def test_every_hook_is_documented_with_its_arguments() -> None:
    rows = re.findall(r"^\| `(kdcore_\w+)` \| `(.+?)` \|", REFERENCE, re.M)
    assert sorted(rows) == sorted(signatures())


def test_every_kind_is_documented() -> None:
    headings = re.findall(r"`(\w+)`", "".join(re.findall(r"^### .+$", REFERENCE, re.M)))
    assert sorted(headings) == sorted(KINDS)


def test_every_public_name_is_documented_once() -> None:
    (table,) = re.findall(r"^## What a plugin may import\n(.*?)^## ", REFERENCE, re.M | re.S)
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?) \|", table, re.M)))
    assert sorted(names) == sorted(kdcore.__all__)


def test_every_check_is_documented() -> None:
    (text,) = re.findall(r"^## Checks\n(.*)", REFERENCE, re.M | re.S)
    for kind, part in re.findall(r"^A (\w+):\n\n((?:\* .+\n(?:  .+\n)*)+)", text, re.M):
        names = re.findall(r"^\* `([\w-]+)`", part, re.M)
        assert names == [check.name for check in checks_of(Subject(kind, "any", None))], kind
    assert re.findall(r"^A (\w+):", text, re.M) == ["plugin", "strategy", "controller", "loss", "model"]


def test_every_version_of_the_hooks_says_what_to_do() -> None:
    rows = re.findall(r"^\| (\d+) \| \w.* \|$", GUIDE, re.M)
    assert rows == [str(number) for number in range(1, kdcore.HOOKS_VERSION + 1)]
    assert f"KDCORE_HOOKS = {kdcore.HOOKS_VERSION}" in GUIDE


def test_links_lead_somewhere() -> None:
    for text in (GUIDE, REFERENCE):
        for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text)):
            page = (DOCS / target).read_text() if target else text
            headings = [
                re.sub(r"[^\w -]", "", h).replace(" ", "-").lower() for h in re.findall(r"^#+ (.+)$", page, re.M)
            ]
            assert not anchor or anchor in headings


# ---------------------------------------------------------------- commands


def commands() -> list[str]:
    lines = "".join(blocks("sh", GUIDE) + blocks("sh", REFERENCE)).splitlines()
    return [line for line in lines if line.startswith("kdcore ")]


@pytest.mark.parametrize("line", commands())
def test_a_printed_command_exists(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    context = typer.main.get_command(build(words)).make_context("kdcore", words)
    while hasattr(context.command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert context.command.callback is not None


# ---------------------------------------------------------------- the guide's code


def test_the_printed_package_is_what_new_plugin_writes(tmp_path: Path) -> None:
    folder, printed = write(PACKAGE, tmp_path), blocks("python", GUIDE)
    for name in ("__init__.py", "strategy.py"):
        assert (folder / "src" / PACKAGE.module / name).read_text() in printed
    (tree,) = (text for text in blocks("text", GUIDE) if text.startswith(f"{PACKAGE.name}/"))
    files = re.findall(r"^  (\S+)", tree, re.M)
    assert {path for path in PACKAGE.files if path not in (".gitignore", "README.md")} == set(files)


def test_the_guides_code_runs(tmp_path: Path) -> None:
    """Each block as a file of its own; those that hold tests are run, among them all checks."""
    folder = write(PACKAGE, tmp_path)
    info = folder / "src" / "kdcore_born_again-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kdcore-born-again\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[kdcore]\nborn-again = kdcore_born_again\n")
    for number, block in enumerate(blocks("python", GUIDE)):
        (tmp_path / f"test_{number}.py").write_text(block)
    path = os.pathsep.join([str(folder / "src"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(tmp_path.glob("test_*.py"))],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d passed", done.stdout, re.M)


def test_the_printed_peers_conform() -> None:
    (block,) = (text for text in blocks("python", GUIDE) if "class Peers" in text)
    scope: dict[str, Any] = {}
    exec(block, scope)
    subject = Subject("strategy", "peers", scope["Peers"])
    assert [v for v in verdicts(subject) if v.state == "failed"] == []


def test_the_printed_choice_conforms_and_is_reported(tmp_path: Path, plugin_file: Callable[..., Path]) -> None:
    (block,) = (text for text in blocks("python", GUIDE) if "class Worth" in text)
    hook = "\n@kdcore.hookimpl\ndef kdcore_register(registry):\n    registry.strategy('worth', Worth)\n"
    host = load_plugins(files=[plugin_file("choosing_size", block + hook)])
    subject = Subject("strategy", "worth", host.catalog.find("strategy", "worth").target)
    assert [v for v in verdicts(subject) if v.state == "failed"] == []
    result = make_run(tmp_path, sets=["strategy=worth"], host=host).execute()
    (choice,) = result["choices"]
    name, other = ("mlp-3", "mlp-1") if result["student"]["model"] == "mlp-3" else ("mlp-1", "mlp-3")
    accuracy = {
        s["members"]["student"]["model"]: s["members"]["student"]["monitor_accuracy"] for s in result["stages"][1:]
    }
    assert choice["text"].startswith(f"{name}, for ")
    assert choice["margin"] == pytest.approx(accuracy[name] - accuracy[other])


def test_the_printed_observer_watches_a_run(tmp_path: Path, plugin_file: Callable[..., Path]) -> None:
    (block,) = (text for text in blocks("python", GUIDE) if "def kdcore_epoch_finished" in text)
    run = make_run(tmp_path, host=load_plugins(files=[plugin_file("watching", block)]))
    assert set(run.info) == {"id", "dir", "seed"}  # as the reference says
    run.execute()
    rows = [json.loads(line) for line in (run.folder / "epochs.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 1, 2]
    assert "accuracy" in rows[-1]["student"]


def test_the_printed_error_is_what_is_shown(cli: Callable[..., Done], plugin_file: Callable[..., Path]) -> None:
    (block,) = (text for text in blocks("python", GUIDE) if "def chosen" in text)
    hook = "\n@kdcore.hookimpl\ndef kdcore_register(registry):\n    registry.command('choose', choose)\n"
    file = plugin_file("choosing", block + hook + "\ndef choose():\n    chosen('studnet', {'student': 1})\n")
    with pytest.raises(kdcore.PlanError) as raised:
        load_plugins(files=[file]).catalog.find("command", "choose").load()()
    assert f"kdcore: PlanError: {raised.value}\n" in blocks("text", GUIDE)


# ---------------------------------------------------------------- the reference's code


@pytest.fixture
def reference(plugin_file: Callable[..., Path]) -> Path:
    return plugin_file("printed_reference", "\n".join(blocks("python", REFERENCE)))


def test_the_references_plugin_offers_every_settled_kind_and_its_recipe_runs(tmp_path: Path, reference: Path) -> None:
    host = load_plugins(files=[reference])
    assert not host.broken
    offered = {kind for kind in KINDS for entry in host.catalog.all(kind) if entry.origin.plugin == reference.stem}
    listed = re.findall(r"^### `(\w+)`\n\nListed", REFERENCE, re.M)
    assert offered == set(KINDS) - set(listed)
    recipe = tomllib.loads(blocks("toml", REFERENCE)[0])
    result = make_run(tmp_path, recipe=recipe, host=host).execute()
    student = result["stages"][-1]["members"]["student"]
    assert "agreement" in student["curve"][-1]
    assert {event["target"] for event in result["stages"][-1]["events"]} == {"data.strength"}


def test_the_references_exporter_writes_what_gives_the_same_logits(tmp_path: Path, reference: Path) -> None:
    host = load_plugins(files=[reference])
    run = make_run(tmp_path, sets=["train.epochs=1"], host=host)
    run.execute()
    module = kdcore.load_model(run.folder / "student.safetensors")
    entry = host.catalog.find("exporter", "npz")
    matches = export(module, entry, entry.options_class()(), tmp_path / "student.npz", 4)
    assert [match.difference for match in matches] == [0, 0]


def test_what_the_reference_registers_conforms(reference: Path) -> None:
    host = load_plugins(files=[reference])
    for kind in ("strategy", "controller", "loss", "model"):
        for entry in host.catalog.all(kind):
            if entry.origin.plugin == reference.stem:
                subject = Subject(kind, entry.name, entry.target, entry.options, host.catalog)
                assert [v for v in verdicts(subject) if v.state == "failed"] == []
