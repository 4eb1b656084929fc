"""Every check of the conformance kit fails the mutant that breaks its promise, and that one alone."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, PLUGINS, SOUND, plugin_source, subject

from kdcore.finding import load_file
from kdcore.testing import Subject, checks_of, subjects_of, verdicts

CHECKS = [check for kind in (*SOUND, "plugin") for check in checks_of(Subject(kind, "any", None))]


def failed(checked):
    return {verdict.check.name: verdict.reason for verdict in verdicts(checked) if verdict.state == "failed"}


@pytest.fixture(autouse=True)
def restored():
    """Takes back what mutants do to this process."""
    state = random.getstate()
    yield
    random.setstate(state)
    os.environ.pop("KDCORE_MUTANT", None)
    sys.modules.pop("mutant_plugin", None)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Loads a plugin from its source."""

    def load(source):
        monkeypatch.syspath_prepend(str(tmp_path))
        path: Path = tmp_path / "mutant_plugin.py"
        path.write_text(source)
        return subjects_of(load_file(path))[0]

    return load


def test_there_is_one_mutant_for_each_check_and_no_other():
    assert len(CHECKS) >= 25
    found = {(kind, name) for kind, group in {**MUTANTS, "plugin": PLUGINS}.items() for name in group}
    assert found == {(check.kind, check.name) for check in CHECKS}


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_sound_passes(kind):
    assert failed(Subject(kind, "sound", SOUND[kind])) == {}


def test_a_sound_plugin_passes(plugin):
    assert failed(plugin(plugin_source())) == {}


@pytest.mark.parametrize("check", [c for c in CHECKS if c.kind != "plugin"], ids=lambda c: f"{c.kind}-{c.name}")
def test_a_mutant_fails_its_check_alone(check):
    found = failed(subject(check.kind, check.name))
    assert list(found) == [check.name], found


@pytest.mark.parametrize("check", [c for c in CHECKS if c.kind == "plugin"], ids=lambda c: c.name)
def test_a_mutant_plugin_fails_its_check_alone(check, plugin):
    found = failed(plugin(plugin_source(check.name)))
    assert list(found) == [check.name], found
