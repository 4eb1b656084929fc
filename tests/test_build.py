"""The compiled op comes and goes: what is built, what is loaded, and what is said where it is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done

from kdcore.losses import _extension
from kdcore.losses._extension import ISAS, build_info, cpu_ops, why_not

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
BUILT = pytest.mark.skipif(not cpu_ops(), reason=f"no compiled op: {why_not('cpu')}")
COMPILER = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")

LOSS = """
import torch
from kdcore.losses import available_backends, dkd_loss
from kdcore.losses._extension import build_info, why_not
logits = torch.arange(12.0).view(3, 4)
dkd_loss(logits, -logits, torch.tensor([0, 1, 2])).item()
print(available_backends(), why_not("cpu"), build_info().get("isa"))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of kdcore that was never built."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "kdcore", tmp_path / "site/kdcore", ignore=ignore)
    return tmp_path / "site"


@pytest.fixture
def alone(package: Path, shell: Callable[..., Done]) -> Callable[..., Done]:
    """Runs Python with that copy, where an editable installation does not lend it its modules."""
    path = os.pathsep.join([str(package), sysconfig.get_path("platlib")])
    return lambda *arguments: shell("-S", *arguments, path=path)


# ---------------------------------------------------------------- loading


@BUILT
def test_facts_of_the_build_are_told() -> None:
    info = build_info()
    assert {"compiler", "flags", "torch", "oldest_torch", "openmp", "isa", "isas"} <= set(info)
    assert info["oldest_torch"] == "2.11"
    assert info["isas"] == list(ISAS[: len(info["isas"])])
    assert info["isa"] in info["isas"]


def test_broken_module_leaves_the_reference_and_a_reason(package: Path, alone: Callable[..., Done]) -> None:
    (package / f"kdcore/_C{SUFFIX}").write_text("no library")
    done = alone("-c", LOSS)
    assert done.out.startswith("('reference',) _C does not load: "), done.err


def test_doctor_says_what_is_missing_and_why(package: Path, alone: Callable[..., Done]) -> None:
    (package / "kdcore/_build.json").write_text('{"missing": {"_C": "no C++ [compiler] was found"}}')
    done = alone("-m", "kdcore", "doctor")
    assert done.code == 0
    assert re.search(r"loss on cpu +│ missing: no C\+\+ \[compiler\] was found", done.out)
    assert re.search(r"loss on cuda +│ missing: it needs the CPU one: no C\+\+ \[compiler\] was found", done.out)
    assert re.search(r"loss reference +│ live", done.out)


@BUILT
def test_doctor_says_what_is_live(cli: Callable[..., Done]) -> None:
    assert re.search(rf"loss on cpu +│ live: {build_info()['isa']} ", cli("doctor").out)


@pytest.mark.parametrize("note", ['{"missing": {}}', "{}", "no json", None])
def test_module_without_a_note_was_not_built_for_this_python(
    note: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "losses").mkdir()
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "losses/_extension.py"))
    if note is not None:
        (tmp_path / "_build.json").write_text(note)
    assert _extension._never_built("_C").startswith(f"_C was not built for {sys.implementation.cache_tag};")


def test_explicit_back_end_that_is_missing_says_why(alone: Callable[..., Done]) -> None:
    done = alone("-c", LOSS.replace("2]))", '2]), backend="cpu")'))
    assert done.code == 1
    assert f"_C was not built for {sys.implementation.cache_tag}" in done.err.splitlines()[-1]


@BUILT
def test_instruction_set_can_be_lowered(shell: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCORE_CPU_ISA", "generic")
    assert shell("-c", LOSS).out.endswith(" None generic\n")


@BUILT
def test_unknown_instruction_set_is_ignored_with_a_warning(
    shell: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCORE_CPU_ISA", "sse9")
    done = shell("-c", LOSS)
    assert done.out.endswith(f" None {build_info()['isas'][-1]}\n")
    assert "KDCORE_CPU_ISA='sse9' is unknown and ignored. Use one of generic, avx2, avx512." in done.err


TWICE = f"""
import sys
import kdcore.losses._extension as first
assert first.cpu_ops(), first.why_not("cpu")
for name in [name for name in sys.modules if name.partition(".")[0] == "kdcore"]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[1])
import kdcore
assert kdcore.__file__.startswith(sys.argv[1])
{LOSS}
"""


@BUILT
def test_second_copy_in_a_process_leaves_the_op_to_the_first(package: Path, shell: Callable[..., Done]) -> None:
    shutil.copy(ROOT / f"kdcore/_C{SUFFIX}", package / "kdcore")
    done = shell("-c", TWICE, package)
    assert done.code == 0, done.err  # two sets of registrations would have ended it
    assert done.out.startswith("('reference',) another copy of kdcore has loaded its op in this process")


# ---------------------------------------------------------------- building


@pytest.fixture
def build(package: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs setup.py where nothing but the given file is to be compiled."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, package)
    shutil.copytree(ROOT / "plugins", package / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("KDCORE_CUDA", "0")
    monkeypatch.delenv("KDCORE_REQUIRE_EXT", raising=False)

    def run(*arguments: str, source: str = "", path: str = "") -> Done:
        (package / "csrc").mkdir(exist_ok=True)
        (package / "csrc/ops.cpp").write_text(source)
        command = [sys.executable, "setup.py", *arguments]
        environment = os.environ | ({"PYTHONPATH": path} if path else {})
        done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, timeout=120)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def no_torch(tmp_path: Path) -> str:
    """A path that hides torch, as an isolated build does."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    return str(tmp_path / "hidden")


def noted(package: Path) -> dict[str, str]:
    return json.loads((package / "kdcore/_build.json").read_text())["missing"]


@COMPILER
def test_compile_error_is_noted_and_takes_an_old_module_away(build: Callable[..., Done], package: Path) -> None:
    (package / f"kdcore/_C{SUFFIX}").write_text("of an earlier build")
    done = build("build_ext", "--inplace", source="#error told so")
    assert done.code == 0
    assert noted(package)["_C"] == "csrc/ops.cpp:1:2: error: #error told so"
    assert "kdcore: _C is left out: csrc/ops.cpp:1:2: error: #error told so" in done.err
    assert not list(package.glob("kdcore/*.so"))


def test_machine_without_a_compiler_installs(
    build: Callable[..., Done], package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(package))
    monkeypatch.delenv("CXX", raising=False)
    assert build("build_ext", "--inplace").code == 0
    assert noted(package)["_C"] == "no C++ compiler was found when kdcore was built (c++, g++ or CXX)"


def test_what_is_required_must_be_built(
    build: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, package: Path
) -> None:
    monkeypatch.setenv("KDCORE_CUDA", "1")
    done = build("build_ext", "--inplace")
    assert done.code == 1
    assert "kdcore: KDCORE_CUDA=1, but this version has no CUDA sources" in done.err
    monkeypatch.setenv("KDCORE_CUDA", "0")
    monkeypatch.setenv("KDCORE_REQUIRE_EXT", "1")
    monkeypatch.setenv("PATH", str(package))
    done = build("build_ext", "--inplace")
    assert done.code == 1
    assert "kdcore: _C could not be built: no C++ compiler was found" in done.err


def test_build_without_torch_says_how(build: Callable[..., Done], no_torch: str) -> None:
    done = build("build_ext", "--inplace", path=no_torch)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "pip install --no-build-isolation ." in done.err


def test_op_can_be_left_out_on_purpose(
    build: Callable[..., Done], no_torch: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCORE_REQUIRE_EXT", "0")
    assert build("build_ext", "--inplace", path=no_torch).code == 0
    assert noted(package)["_C"] == "torch was not importable when kdcore was built"


def test_source_distribution_needs_no_torch_and_holds_every_source(
    build: Callable[..., Done], no_torch: str, package: Path
) -> None:
    shutil.copytree(ROOT / "csrc", package / "csrc")
    done = build("sdist", path=no_torch)
    assert done.code == 0, done.err
    with tarfile.open(next(package.glob("dist/*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "kdcore/losses/_extension.py"} <= names
