"""The README's commands, recipe and plugin work as printed."""

from __future__ import annotations

import glob
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcore.errors import EXIT_CODES
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


LOOP, SCRIPT, PLUGIN = blocks("python")


def commands(text: str) -> list[str]:
    lines = "".join(blocks("sh", text)).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def expanded(word: str, folder: Path) -> list[str]:
    """As a shell does it."""
    return glob.glob(word, root_dir=folder) if "*" in word else [word]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's working directory: the examples and the README's plugin."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "born_again.py").write_text(PLUGIN)
    return folder


@pytest.mark.parametrize("line", [c for c in commands(README + ARCHITECTURE) if c.startswith("kdcore")])
def test_a_printed_command_works(folder, line):
    words = [name for word in shlex.split(line, comments=True) for name in expanded(word, folder)]
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", [c for c in commands(README + ARCHITECTURE) if c.startswith("make")])
def test_a_printed_target_exists(line):
    subprocess.run(["make", "-n", *shlex.split(line, comments=True)[1:]], cwd=ROOT, capture_output=True, check=True)


def test_every_printed_command_is_checked():
    assert all(line.startswith(("kdcore ", "make ")) for line in commands(README + ARCHITECTURE))


def test_the_printed_recipe_is_the_demos(tmp_path):
    (tmp_path / "printed.toml").write_text(blocks("toml")[0])
    catalog = load_plugins().catalog
    printed, demo = (load(path) for path in (tmp_path / "printed.toml", ROOT / "examples" / "digits.toml"))
    assert compile_recipe(printed, catalog)[1] == compile_recipe(demo, catalog)[1]
    assert printed.teacher == demo.teacher
    assert printed.data == demo.data


def test_the_plugin_is_about_30_lines():
    assert len(PLUGIN.splitlines()) <= 30


def test_the_losses_work_as_printed():
    student, images = torch.nn.Linear(4, 3), torch.randn(8, 4)
    labels = torch.arange(8) % 3
    exec(
        LOOP, {"torch": torch, "student": student, "teacher": torch.nn.Linear(4, 3), "images": images, "labels": labels}
    )
    assert student.weight.grad is not None


def test_the_15_lines_are_the_script_that_test_api_script_runs():
    assert blocks("python", (ROOT / "docs" / "python.md").read_text())[0] == SCRIPT


def test_the_exit_codes_are_those_of_the_code():
    rows = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", README, re.M))
    assert {int(code): text.replace("`", "") for code, text in rows.items()} == {
        code: text for code, text in EXIT_CODES.items() if code < 128
    }


def test_the_docs_link_to_files_that_exist():
    for text, base in ((README, ROOT), (ARCHITECTURE, ROOT / "docs")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (base / target).exists(), target
