"""`kdcore new-plugin` writes packages that install, pass and run; `kdcore check-plugin` finds what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done

import kdcore
from kdcore.scaffold import KINDS, LONGEST_NAME

ROOT = Path(__file__).parents[1]


def beside(folder: Path) -> str:
    """PYTHONPATH with ``folder`` before this checkout."""
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", str(ROOT))])


# ---------------------------------------------------------------- from nothing to a run


@pytest.fixture
def clean(tmp_path: Path) -> Callable[..., str]:
    """Runs Python in a clean environment: this checkout, and what the running one has installed, by their paths."""
    home = tmp_path / "environment"
    venv.create(home)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    seen = [ROOT, ROOT / "plugins", *{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    Path(paths["purelib"], "seen.pth").write_text("".join(f"{path}\n" for path in seen))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def run(folder: Path, *arguments: object) -> str:
        command = [str(home / "bin/python"), *map(str, arguments)]
        environment = {**kept, "COLUMNS": "200", "PYTHONNOUSERSITE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind != "strategy")) for kind in KINDS]
)
def test_a_new_plugin_installs_passes_its_tests_and_runs(kind: str, tmp_path: Path, clean: Callable[..., str]) -> None:
    said = clean(tmp_path, "-m", "kdcore", "new-plugin", "kdcore-acme", f"--{kind}")
    package = tmp_path / "kdcore-acme"
    assert "kdcore check-plugin acme" in said
    clean(package, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet", ".")
    assert str(tmp_path / "environment") in clean(package, "-c", "import kdcore_acme; print(kdcore_acme.__file__)")
    assert " passed" in clean(package, "-m", "pytest", "-q")
    assert " checks passed" in clean(package, "-m", "kdcore", "check-plugin", "acme")
    assert "acme (kdcore-acme 0.1.0)" in clean(package, "-m", "kdcore", "plugins")
    clean(package, "-m", "kdcore", "run", "recipe.toml")
    assert list(package.glob("runs/recipe-*/student.safetensors"))


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", ["acme", "a" + "b" * (LONGEST_NAME - 1), "kdcore-born-again"])
def test_what_is_written_passes_ruff(name: str, cli: Callable[..., Done], tmp_path: Path) -> None:
    for kind in KINDS:
        assert cli("new-plugin", name, f"--{kind}", "--dir", kind).code == 0
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *KINDS], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


def test_what_is_written_names_itself(cli: Callable[..., Done], tmp_path: Path) -> None:
    assert cli("new-plugin", "KDCore_Born.Again").code == 0
    project = tomllib.loads((tmp_path / "kdcore-born-again/pyproject.toml").read_text())["project"]
    assert project["name"] == "kdcore-born-again"
    assert project["entry-points"] == {"kdcore": {"born-again": "kdcore_born_again"}}
    assert project["dependencies"] == [f"kdcore>={kdcore.__version__}"]
    module = (tmp_path / "kdcore-born-again/src/kdcore_born_again/__init__.py").read_text()
    assert f"KDCORE_HOOKS = {kdcore.HOOKS_VERSION}\n" in module
    assert '"kdcore_born_again.strategy:BornAgainStrategy"' in module


def test_no_new_plugin_imports_torch_before_it_is_used(
    cli: Callable[..., Done], shell: Callable[..., Done], tmp_path: Path
) -> None:
    for kind in KINDS:
        cli("new-plugin", f"acme-{kind}", f"--{kind}")
        code = f"import sys, acme_{kind} as found; from kdcore.registry import *; from kdcore.origin import Origin\n"
        code += "registrar = Registrar(Origin('acme')); found.kdcore_register(registrar)\n"
        code += "print(registrar.entries[0].check({}, ''), 'torch' in sys.modules)"
        done = shell("-c", code, path=beside(tmp_path / f"acme-{kind}/src"))
        assert done.out.endswith("} False\n"), done.err


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("two words", "no name of a package. Use letters, digits and -"),
        ("-acme", "No such option"),
        ("acme-", "no name of a package"),
        ("class", "'class' is no name of a module. Try kdcore-my-class"),
        ("3d", "'3d' is no name of a module"),
        ("kdcore-3d", "'kdcore_3d' is no name of a module"),
        ("a" * (LONGEST_NAME + 1), f"{LONGEST_NAME + 1} characters. Use at most {LONGEST_NAME}"),
        ("json", "a module 'json' is importable"),
        ("scikit-learn", "a distribution 'scikit-learn' is installed"),
        ("dskd", "a plugin 'dskd' is installed"),
        ("kdcore-vision", "a plugin 'vision' is installed"),
        ("distill", "a plugin 'distill' is installed"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, says: str, cli: Callable[..., Done], tmp_path: Path) -> None:
    done = cli("new-plugin", name)
    assert done.code == 2
    assert says in done.err
    assert not list(tmp_path.iterdir())


def test_a_name_that_recipes_use_for_something_else_of_that_kind_is_refused(cli: Callable[..., Done]) -> None:
    assert "the loss 'core/kd' has that name. Choose another" in cli("new-plugin", "kdcore-kd", "--loss").err
    assert cli("new-plugin", "kdcore-kd", "--controller").code == 0


def test_a_folder_that_exists_is_left_alone(cli: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "acme").mkdir()
    done = cli("new-plugin", "acme")
    assert (done.code, "acme: it exists already" in done.err) == (2, True)
    assert not list((tmp_path / "acme").iterdir())


def test_a_place_that_cannot_be_written_is_said(cli: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = cli("new-plugin", "acme", "--dir", "file")
    assert (done.code, "cannot be written: Not a directory" in done.err) == (4, True)


def test_one_kind_a_package(cli: Callable[..., Done]) -> None:
    done = cli("new-plugin", "acme", "--loss", "--model")
    assert (done.code, "--loss --model: one kind a package" in done.err) == (2, True)


# ---------------------------------------------------------------- check-plugin

SOUND = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.strategy("acme-plain", Plain)

class Plain:
    def plan(self, run, options):
        teacher = run.label_only("teacher", run.teacher)
        student = run.distilled(run.student, teacher["teacher"])
        yield [teacher, student]
        return kdcore.Outcome(student["student"], teacher["teacher"])
"""

WRONG = """
import kdcore
from torch import nn

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("acme-match", Match)

class Match(nn.Module):
    needs = frozenset({"logits"})

    @classmethod
    def build(cls, shapes, options):
        return cls()

    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).square().mean(1)
"""


def test_a_sound_plugin_file_passes(cli: Callable[..., Done], plugin_file: Callable[..., Path]) -> None:
    done = cli("check-plugin", plugin_file("acme_sound", SOUND))
    assert done.code == 0, done.out + done.err
    assert re.search(r"strategy-acme-plain +│ replays +│ passed", done.out)
    assert re.search(r"\d+ checks passed, \d+ do not apply", done.out)


def test_a_loss_that_is_wrong_fails_and_the_check_is_named(
    cli: Callable[..., Done], plugin_file: Callable[..., Path]
) -> None:
    done = cli("check-plugin", plugin_file("acme_wrong", WRONG))
    assert done.code == 3
    assert "loss-acme-match-gives-a-scalar" in done.err
    assert re.search(r"loss-acme-match +│ gives-a-scalar +│ failed +│ it gives \(\d+,\)", done.out)


def test_an_installed_plugin_is_checked_by_its_name(cli: Callable[..., Done]) -> None:
    done = cli("check-plugin", "earlystop")
    assert done.code == 0, done.out + done.err
    assert "controller-earlystop" in done.out


def test_a_broken_plugin_says_why(
    cli: Callable[..., Done], shell: Callable[..., Done], plugin_file: Callable[..., Path], install: Callable[..., Path]
) -> None:
    done = cli("check-plugin", plugin_file("acme_broken", "import kdcore\n1 / 0\n"))
    assert (done.code, "ZeroDivisionError: division by zero" in done.err) == (3, True)
    site = install("acme", "import kdcore\nKDCORE_HOOKS = 99\n")
    done = shell("-m", "kdcore", "check-plugin", "acme", path=beside(site))
    assert (done.code, "acme (acme-dist 1.0): it needs kdcore hooks 99" in done.err) == (3, True)
    done = cli("check-plugin", "earlystopp")
    assert (done.code, "Did you mean 'earlystop'?" in done.err) == (3, True)
