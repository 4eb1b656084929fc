"""docs/result.md names every key of result.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from small import make_run
from test_search_runs import RECIPE, mlp

HERE = Path(__file__).parent
GUIDE = (HERE.parent / "docs" / "result.md").read_text()
PARTS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)+)", GUIDE, re.M))


def named(part: str) -> set[str]:
    """The keys in the first column of a part's table, or of a part without one all that it has as code."""
    rows = re.findall(r"^\| (`.+?) \|", PARTS[part], re.M)
    return {word for text in rows or [PARTS[part]] for word in re.findall(r"`(\w+)`", text)}


def found(result: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[str]]]:
    """Each part's name with the keys that the result has there."""
    yield "The whole", result
    yield "The protocol", result["protocol"]
    for stage in result["stages"]:
        yield "A stage", stage
        yield from (("A member", member) for member in stage["members"].values())
    yield from (("A learner", result[role]) for role in ("student", "teacher", "control") if result[role])
    yield from (("A learner", set(r) - {"seed"}) for refs in result["replicates"].values() for r in refs)
    yield from (("A choice", choice) for choice in result["choices"])
    yield "Evidence of a search", result["evidence"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    strategy = {**RECIPE["strategy"], "candidates": [mlp(2)]}
    return make_run(tmp_path_factory.mktemp("result"), recipe={**RECIPE, "strategy": strategy}).execute()


def test_every_key_of_a_search_is_documented_and_no_other(searched):
    keys = list(found(searched))
    assert {part for part, _ in keys} == set(PARTS)
    assert [(part, set(there) ^ named(part)) for part, there in keys if set(there) != named(part)] == []


def test_every_key_of_the_reports_fixture_is_documented():
    for part, there in found(json.loads((HERE / "fixtures" / "result.json").read_text())):
        assert set(there) <= named(part), part


def test_the_keys_of_run_plugins_and_events_are_documented(searched):
    stages = searched["stages"]
    small = [searched["run"], *searched["plugins"], *(event for stage in stages for event in stage["events"])]
    assert len(small) > 1 + len(searched["plugins"])
    words = set(re.findall(r"`(\w+)`", PARTS["The whole"] + PARTS["A stage"]))
    assert {key for table in small for key in table} <= words
