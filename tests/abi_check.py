"""Loads the op that is built here in other versions of torch, and compares its numbers with the reference there.

``make abi-check``, or ``make abi-check TORCH_VERSIONS="2.11.0 2.13.0"``. Each version gets an environment of its own in
build/abi (a large download, once), with nothing of kdcore but this tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("numpy", "pydantic", "typing_extensions")  # what kdcore.losses imports beside torch

SMOKE = """
import itertools, torch
from kdcore.losses import dkd_loss
from kdcore.losses._extension import build_info, cuda_ops, why_not
assert why_not("cpu") is None, why_not("cpu")
generator, worst = torch.Generator().manual_seed(0), 0.0
dtypes = torch.float64, torch.float32, torch.bfloat16, torch.float16
for dtype, mode, reduction in itertools.product(dtypes, ("none", "class", "instance"), ("mean", "none")):
    student, teacher = torch.randn(2, 33, 100, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, 100, (33,), generator=generator).index_fill(0, torch.tensor([3]), -100)
    losses, grads = [], []
    for backend in ("cpu", "reference"):
        leaf = student.clone().requires_grad_()
        loss = dkd_loss(leaf, teacher, target, normalize=mode, ce_weight=0.5, reduction=reduction, backend=backend)
        loss.sum().backward()
        losses.append(loss.double()), grads.append(leaf.grad.double())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    near = float(grads[1].abs().max()) * (2e-2 if dtype.itemsize == 2 else 1e-4)
    torch.testing.assert_close(*grads, rtol=0, atol=near)
info = build_info()
print(f"torch {torch.__version__}: ok with a build by torch {info['torch']}; CUDA: {why_not('cuda') or 'loads'}")
"""


def environment(version: str) -> Path:
    """The Python of an environment that holds this torch."""
    folder = ROOT / "build/abi" / version
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={version}", *NEEDED], check=True)
        (folder / "ready").touch()
    return python


def main(versions: list[str]) -> int:
    failed = []
    for version in versions:
        command = [environment(version), "-c", SMOKE]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT / "build")
        failed += [version] if done.returncode else []
    print(f"failed: {', '.join(failed)}" if failed else f"{len(versions)} of {len(versions)} versions of torch")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
