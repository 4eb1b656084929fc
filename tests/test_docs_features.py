"""docs/features.md: every registered loss has a row, and the printed loss works."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from small import RECIPE
from test_readme import blocks

import kdcore
from kdcore.plan import SourceSpec, Spec
from kdcore.plugins import load_plugins
from kdcore.recipe import _objective
from kdcore.tables import ObjectiveTable

PAGE = (Path(__file__).parents[1] / "docs" / "features.md").read_text()
(OWN,) = blocks("python", PAGE)
ROWS = dict(re.findall(r"^\| `(\w+)` \|.*\| (.+?) \|$", PAGE.partition("## Adapters")[0], re.M))
DATA = SourceSpec(Spec("core/digits"), transforms=(Spec("core/views"),))


def test_every_loss_of_the_plugin_has_a_row():
    catalog = load_plugins().catalog
    assert sorted(ROWS) == sorted(e.name for e in catalog.all("loss") if e.origin.plugin == "features")


@pytest.mark.parametrize("name", ROWS)
def test_the_printed_line_of_a_loss_is_a_term(name):
    line = ", ".join(re.findall(r"`(.+?)`", ROWS[name]))
    table = tomllib.loads(f"term = {{ {line} }}")["term"]
    (term,) = _objective([ObjectiveTable(**table)], load_plugins().catalog, DATA)
    assert term.loss == f"features/{name}"


def test_the_printed_loss_takes_one_file_of_under_40_lines(tmp_path, cli, plugin_file):
    file = plugin_file("cosine", OWN)
    assert len(OWN.splitlines()) < 40
    assert cli("check-plugin", file).code == 0
    objective = [{"loss": "cross_entropy"}, {"loss": "cosine", "weight": 2.0}]
    recipe = {**RECIPE, "objective": objective, "student": {"model": "mlp", "size": 2, "width": 8}}
    result = kdcore.run(recipe, root=tmp_path / "runs", plugin_files=[file], quiet=True)
    assert result["student"]["test_accuracy"] > 0
