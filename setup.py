"""Builds the compiled loss op: ``kdcore._C`` (CPU) and, where nvcc is found, ``kdcore._C_cuda``.

It is built against the torch that is installed, by LibTorch's stable ABI, and loads in every torch from 2.11 on.
``kdcore._C_autograd``, a shorter way from Python to the op, serves its own torch alone. What cannot be built is
left out, its reason kept in ``kdcore/_build.json`` for ``kdcore doctor``; the losses then run on the plain-torch
reference. The rest of the package is described in pyproject.toml.

KDCORE_REQUIRE_EXT=1: whatever goes wrong is fatal. =0: nothing is, a missing torch neither.
KDCORE_CUDA=0: no ``_C_cuda``. =1: it must be built.
TORCH_CUDA_ARCH_LIST, MAX_JOBS: as in torch.utils.cpp_extension.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TARGET = "0x020b000000000000"  # the oldest torch that a build works with: 2.11
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"  # 8.6 and 8.9 run what is built for 8.0
HOST = ["-O3", "-std=c++20", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"]
HALF = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")  # torch takes these away
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]  # said by gcc of its own AVX-512 headers


def find_cuda() -> str | None:
    """The toolkit; torch takes the parent of the folder where nvcc is found, which may hold no more than a link."""
    nvcc = shutil.which("nvcc")
    beside = nvcc and str(Path(nvcc).resolve().parents[1])
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", beside):
        if home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            return home
    return None


def prepare() -> None:
    """What torch.utils.cpp_extension reads from the environment, some of it when it is imported."""
    if home := find_cuda():
        os.environ["CUDA_HOME"] = home
    path, own = os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([path, own])  # ninja, in an environment that is not active


prepare()
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    NO_TORCH: str | None = f"{type(error).__name__}: {error}"
    Base: type[build_ext] = build_ext
else:
    NO_TORCH, Base = None, BuildExtension


def cuda_problem() -> str | None:
    """Why there is no ``_C_cuda`` to build."""
    if os.environ.get("KDCORE_CUDA") == "0":
        return "KDCORE_CUDA=0 when kdcore was built"
    if not glob("csrc/cuda/*.cu"):
        return "this version has no CUDA sources"
    if not torch.version.cuda:
        return f"kdcore was built with torch {torch.__version__}, which has no CUDA"
    return None if find_cuda() else "no CUDA toolkit (nvcc) was found when kdcore was built"


def extensions() -> list[Extension]:
    if NO_TORCH:
        return [Extension("kdcore._C", [])]
    defines = [
        *QUIET,
        f"-DTORCH_TARGET_VERSION={TARGET}",
        f'-DKDCORE_TORCH="{torch.__version__}"',
        f'-DKDCORE_FLAGS="{" ".join(HOST)}"',
        f"-ffile-prefix-map={ROOT}/=",
    ]
    shared = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        "extra_link_args": ["-fopenmp"],
    }
    sources = [*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))]
    built = [CppExtension("kdcore._C", sources, extra_compile_args={"cxx": HOST + defines}, **shared)]
    # torch's own C++, for this torch alone: another one compiles it anew
    own = {"cxx": [*(flag for flag in HOST + QUIET if flag != "-fopenmp"), f'-DKDCORE_TORCH="{torch.__version__}"']}
    built.append(CppExtension("kdcore._C_autograd", ["csrc/autograd/fused.cpp"], extra_compile_args=own))
    if cuda_problem() is None:
        if not torch.cuda.is_available():  # torch would ask the GPUs that are not there
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "this machine's")
        cxx = [*HOST, *defines, "-DUSE_CUDA", f'-DKDCORE_CUDA_ARCHS="{architectures}"']
        sources = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
        plain = [f"-U__CUDA_NO_{name}__" for name in HALF]
        flags = {"cxx": cxx, "nvcc": ["-O3", "-std=c++20", "--threads=0", *plain]}
        shared["include_dirs"] = [str(ROOT / "csrc")]  # torch extends the list that it is given
        built.append(CUDAExtension("kdcore._C_cuda", sources, extra_compile_args=flags, **shared))
    return built


@contextmanager
def recorded(log: list[str]) -> Iterator[None]:
    """Keeps what compilers print, to look for the reason of a failure."""
    sys.stdout.flush()
    saved = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            for number, old in zip((1, 2), saved, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            log += file.read().decode(errors="replace").splitlines()


class BuildOps(Base):  # type: ignore[misc, valid-type]
    """Builds each module on its own: one that fails takes nothing else with it, unless it is required."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace or self.editable_mode:  # one place, not pip's temporary folder: the next build is incremental
            self.build_temp = str(ROOT / "build/temp")

    def run(self) -> None:
        self.missing: dict[str, str] = {}
        if NO_TORCH:
            self.leave_out_everything()
        else:
            self.check_required()
            super().run()
        self.record()

    def build_extensions(self) -> None:
        wanted, built = self.extensions, []
        for extension in wanted:
            self.extensions, log = [extension], []
            try:
                if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
                    raise RuntimeError("no C++ compiler was found when kdcore was built (c++, g++ or CXX)")
                with recorded(log):
                    super().build_extensions()
                built.append(extension)
                if self.verbose:
                    print("\n".join(log))
            except Exception as error:
                print("\n".join(log))
                self.fail(extension.name.rpartition(".")[2], reason(error, log))
        self.extensions = built

    def fail(self, name: str, why: str) -> None:
        if os.environ.get("KDCORE_REQUIRE_EXT") == "1" or (name == "_C_cuda" and os.environ.get("KDCORE_CUDA") == "1"):
            sys.exit(f"kdcore: {name} could not be built: {why}")
        print(f"kdcore: {name} is left out: {why}", file=sys.stderr)
        self.missing[name] = why

    def check_required(self) -> None:
        if why := cuda_problem():
            self.missing["_C_cuda"] = why
            if os.environ.get("KDCORE_CUDA") == "1":
                sys.exit(f"kdcore: KDCORE_CUDA=1, but {why} (CUDA_HOME={os.environ.get('CUDA_HOME')})")

    def leave_out_everything(self) -> None:
        if os.environ.get("KDCORE_REQUIRE_EXT") != "0":
            sys.exit(
                f"kdcore: the compiled loss op needs torch when it is built ({NO_TORCH}).\n"
                "Install torch first, then: pip install --no-build-isolation .\n"
                "Or leave the op out, so that losses run in plain torch: KDCORE_REQUIRE_EXT=0 pip install ."
            )
        self.missing = dict.fromkeys(("_C", "_C_autograd", "_C_cuda"), "torch was not importable when kdcore was built")
        self.extensions = []

    def record(self) -> None:
        """Leaves the reasons beside the package, and no module there that an earlier build made."""
        package = ROOT / "kdcore" if self.inplace else Path(self.build_lib, "kdcore")
        for name in self.missing:
            for old in package.glob(f"{name}.*.so"):
                old.unlink()
        package.mkdir(parents=True, exist_ok=True)
        facts = {"torch": None if NO_TORCH else torch.__version__, "missing": self.missing}
        (package / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")


def reason(error: Exception, log: list[str]) -> str:
    """The first line in which a compiler says what is wrong, else the error."""
    words = (": error:", ": fatal error:", " error : ", "error: ")
    said = next((line.strip() for line in log if any(word in line for word in words)), None)
    why = said or str(error).strip().split("\n")[0] or type(error).__name__
    return why.replace(f"{ROOT}/", "")[:300]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOps})
