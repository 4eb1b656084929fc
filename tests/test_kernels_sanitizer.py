"""The CPU kernels stay within the memory that they are given, and within what the language defines."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "tests" / "sanitizer" / "driver.cpp"
SANITIZE = ["-fsanitize=address,undefined", "-fsanitize=float-cast-overflow", "-fno-sanitize-recover=all"]
# as setup.py compiles them, but -O0: the instrumented kernels take minutes to optimise
FLAGS = ["-std=c++20", "-O0", "-g1", "-ffp-contract=off", "-fopenmp", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *SANITIZE]
WRAP = "-Wl,--wrap=_ZN6kdcore3cpu7scratchEl"  # the driver gives the kernels their scratch memory
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive", "UBSAN_OPTIONS": "print_stacktrace=1"}


def together(commands, folder):
    """Runs commands at the same time; gives each one's exit status and output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]


def sanitizing_compiler(folder):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (folder / "probe.cpp").write_text("int main() {}\n")
    ((code, output),) = together([[compiler, *SANITIZE, "-fopenmp", "-std=c++20", "probe.cpp", "-o", "probe"]], folder)
    if code:
        pytest.skip(f"{compiler} has no sanitizers: {output.strip().splitlines()[-1]}")
    return compiler


def build(compiler, sources, folder):
    commands = [[compiler, *FLAGS, "-c", str(source), "-o", f"{source.stem}.o"] for source in sources]
    for command, (code, output) in zip(commands, together(commands, folder), strict=True):
        assert code == 0, f"{command[-3]}: {output}"
    objects = [f"{source.stem}.o" for source in sources]
    ((code, output),) = together([[compiler, *FLAGS, WRAP, *objects, "-o", "driver"]], folder)
    assert code == 0, output


@pytest.mark.long
def test_the_kernels_of_every_instruction_set_are_clean_under_sanitizers(tmp_path):
    compiler = sanitizing_compiler(tmp_path)
    build(compiler, [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), DRIVER], tmp_path)
    isas = ("generic", "avx2", "avx512")
    ends = together([["./driver", isa] for isa in isas], tmp_path)
    for isa, (code, output) in zip(isas, ends, strict=True):
        assert code in (0, 2), f"{isa}: {output[-4000:]}"
        assert code == 2 or f"{isa}: " in output
    assert ends[0][0] == 0, "the generic kernels run everywhere"
