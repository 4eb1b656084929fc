"""Files that decide trained weights are recorded, so that nobody changes them without thinking of stored results.

make numerics        after such a change, and after raising kdcore.NUMERICS if it changes a trained weight
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import kdcore

RECORD = Path(__file__).with_suffix(".json")
HOME = Path(kdcore.__file__).parent
DECIDE = ("training/**/*.py", "losses/**/*.py", "data/**/*.py", "codec.py", "plan.py", "seeds.py")


def record() -> dict[str, object]:
    files = sorted(path for pattern in DECIDE for path in HOME.glob(pattern))
    sums = {path.relative_to(HOME).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"NUMERICS": kdcore.NUMERICS, "files": sums}


def test_a_change_to_what_decides_weights_is_deliberate():
    now, before = record(), json.loads(RECORD.read_text())
    changed = sorted(set(now["files"].items()) ^ set(before["files"].items()))
    names = ", ".join(sorted({name for name, _ in changed}))
    assert now == before, f"{names} changed: raise kdcore.NUMERICS if a trained weight can change, then `make numerics`"


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), indent=1) + "\n")
