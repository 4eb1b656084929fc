"""What ptxas makes of the CUDA kernels: registers, memory and spills, for each architecture. ``make cuda-check``.

Needs nvcc and no GPU. A kernel that spills registers to memory ends it with exit code 1. ``--write`` records the table
in benchmarks/results/cuda-kernels.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TABLE = ROOT / "benchmarks/results/cuda-kernels.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

COMPILING = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


class Kernel(NamedTuple):
    name: str
    registers: int
    shared: int
    stack: int
    spilled: int


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return next((found for home in homes if (found := shutil.which(f"{home}/bin/nvcc"))), None) or shutil.which(
        "nvcc", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin"
    )


def kernels_of(report: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` prints."""
    kernels, name, stack, spilled = [], "", 0, 0
    for line in report.splitlines():
        if found := COMPILING.search(line):
            name, stack, spilled = found[1], 0, 0
        elif found := SPILLS.search(line):
            stack, spilled = int(found[1]), int(found[2]) + int(found[3])
        elif name and (found := USED.search(line)):
            kernels.append(Kernel(name, int(found[1]), int(found[2] or 0), stack, spilled))
            name = ""
    return kernels


def compiled(nvcc: str, source: Path, architecture: str) -> list[Kernel]:
    command = [nvcc, "-O3", "-std=c++20", f"-I{ROOT}/csrc", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-o", os.devnull, str(source)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source.name} does not compile for {architecture}:\n{done.stdout}{done.stderr}")
    return kernels_of(done.stderr)


def version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return f"nvcc {found[1]}" if found else "nvcc"


def readable(names: list[str]) -> list[str]:
    """Names as in the source, where c++filt is there to tell."""
    if not shutil.which("c++filt"):
        return names
    shown = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True).stdout.split("\n")
    return [name.replace("kdcore::cuda::", "").replace("(anonymous namespace)::", "") for name in shown]


def family(name: str) -> tuple[str, str]:
    """A kernel's name, with the classes of its threads where there are tiles of several, and its logits' type."""
    base, _, rest = name.partition("<")
    dtype, *others = [part.strip() for part in rest.strip("> ").split(",")]
    return f"{base}, {others[0]} classes a thread" if base == "tile_rows" else base, dtype.partition(">")[0]


def table(found: dict[str, list[Kernel]]) -> str:
    """The worst of each family, as `registers / shared bytes` for each architecture."""
    families: dict[tuple[str, str], dict[str, list[Kernel]]] = {}
    for architecture, kernels in found.items():
        for kernel, name in zip(kernels, readable([kernel.name for kernel in kernels]), strict=False):
            families.setdefault(family(name), {}).setdefault(architecture, []).append(kernel)
    lines = [["kernel", "logits", "variants", *found], ["---"] * (3 + len(found))]
    for (name, dtype), by in sorted(families.items()):
        cells = [f"{max(k.registers for k in ks)} / {max(k.shared for k in ks)}" for ks in by.values()]
        lines.append([name, dtype, str(len(next(iter(by.values())))), *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> int:
    if not SOURCES:
        print("cuda-check: this version has no CUDA sources")
        return 0
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: nvcc was not found, so nothing was checked. Install the CUDA toolkit, or set CUDA_HOME.")
        return 1
    jobs = [(source, architecture) for architecture in ARCHITECTURES for source in SOURCES]
    with ThreadPoolExecutor() as pool:
        compiling = pool.map(lambda job: compiled(nvcc, *job), jobs)
    found: dict[str, list[Kernel]] = {}
    for (_, architecture), kernels in zip(jobs, compiling, strict=True):
        found.setdefault(architecture, []).extend(kernels)
    text = table(found)
    print(text)
    if "--write" in sys.argv:
        TABLE.write_text(f"# The CUDA kernels: registers / bytes of shared memory ({version(nvcc)})\n\n{text}\n")
    spilling = [
        f"{architecture} {k.name}: {k.spilled} bytes" for architecture, ks in found.items() for k in ks if k.spilled
    ]
    print("\n".join([f"{sum(map(len, found.values()))} kernels, {len(spilling)} of them spill", *spilling]))
    return 1 if spilling or not any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
