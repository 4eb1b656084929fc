"""Runs that are killed end with the weights of a run that was not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def torture(*arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(HERE / "kill.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_resume_after_kill_is_bit_exact():
    assert torture("3").endswith("3/3\n")


@pytest.mark.parametrize(
    ("name", "runs"),
    [("stream", "1"), *(pytest.param(n, "4", marks=pytest.mark.long) for n in ("swap", "two-player", "stream"))],
)
def test_what_comes_resumes_after_kill_bit_exact(name, runs):
    recipe, plugin = HERE / "coming" / f"{name}.toml", HERE / "coming" / "proofs.py"
    assert torture(runs, "7", str(recipe), str(plugin)).endswith(f"{runs}/{runs}\n")
