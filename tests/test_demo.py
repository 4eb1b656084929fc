"""The demo's claim: the teacher has something to teach, whatever the seed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from small import make_run

DEMO = tomllib.loads((Path(__file__).parents[1] / "examples" / "digits.toml").read_text())


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demos_teacher_beats_the_control_by_a_point(tmp_path, seed):
    result = make_run(tmp_path, recipe={**DEMO, "seed": seed}).execute()
    assert result["teacher"]["test_accuracy"] - result["control"]["test_accuracy"] >= 0.01
    assert not [
        text for text in result["warnings"] if "teacher cnn-3" in text
    ]  # an assistant may be worse, and is told
