"""Reads golden vectors (tests/golden/README.md), and says what counts as equal to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, dict[str, Any]]:
    """The cases of a file by name; ``hp`` holds the hyper-parameters."""
    cases: dict[str, dict[str, Any]] = {}
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            head, _, field = key.partition("/")
            cases.setdefault(head, {})[field] = arrays[key]
    for case in cases.values():
        case["hp"] = json.loads(str(case.pop("hp_json")))
    return cases


def check_float64(found: Any, case: dict[str, Any], key: str = "grad_student") -> None:
    """A gradient in float64 is the recorded one."""
    assert np.abs(found - case[key]).max() <= 1e-9 * np.abs(case[key]).max() + 1e-13
