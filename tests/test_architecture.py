"""What comes later fits: role swap, a two-player step and a stream are plugins, without a change to the core."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from small import PROOFS, RECIPE, make_run

from kdcore.executor import DataCache
from kdcore.keys import Keys
from kdcore.plugins import load_plugins
from kdcore.store import Store
from kdcore.training.session import open_session


@pytest.fixture(scope="module")
def host():
    return load_plugins(files=[PROOFS])


def test_roles_swap_by_decisions(tmp_path, host):
    recipe = {**RECIPE, "strategy": "swap", "train": {"epochs": 4}}
    stage = make_run(tmp_path, recipe=recipe, host=host).execute()["stages"][-1]
    curves = {name: member["curve"] for name, member in stage["members"].items()}
    trained = {name: [row["tick"] for row in curve if "train.loss" in row] for name, curve in curves.items()}
    assert trained == {"student": [1, 2], "teacher": [3, 4]}
    assert curves["teacher"][0]["accuracy"] == curves["teacher"][1]["accuracy"] != curves["teacher"][3]["accuracy"]


def open_players(tmp_path, host):
    """The two-player stage before its first step, its teacher trained."""
    run = make_run(tmp_path, recipe={**RECIPE, "strategy": "two-player"}, host=host)
    run.execute()
    stage = next(stage for stage in run.stages.values() if stage.name == "players")
    load = DataCache(host.catalog)
    keys = Keys(host.catalog, 0, run.settings, lambda spec: load(spec).fingerprint)
    job = keys.job(stage)
    session = open_session(job, host.catalog, load(stage.data), Store(run.settings.store), lambda event: None, {})
    session.begin_tick()
    return session


def test_the_generators_gradient_through_a_frozen_teacher_equals_autograds(tmp_path, host):
    session = open_players(tmp_path, host)
    session.knobs.set("generator.fool.weight", 0.0)  # what is left flows through the teacher alone
    session.begin_tick()
    generator, teacher = session.learners["generator"], session.learners["teacher"]
    batch = session.source.batch(0)
    before = {name: tensor.clone() for name, tensor in generator.module.state_dict().items()}
    frozen = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    session.context.begin(0, 1, 1)
    session.step_kind(session.context, batch)
    found = [parameter.grad.clone() for parameter in generator.parameters]

    generator.module.load_state_dict(before)
    session.context.begin(0, 1, 1)
    noise = torch.randn(128, sys.modules["proofs"].NOISE, generator=session.context.generator("generator"))
    torch.manual_seed(session.context.seed("generator"))  # the same dropout as in the step
    loss = 0.5 * F.cross_entropy(teacher.module(generator.module(noise)), batch.target)
    expected = torch.autograd.grad(loss, generator.parameters)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert any(f.abs().max() > 0 for f in found)
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    assert all(torch.equal(frozen[name], tensor) for name, tensor in teacher.module.state_dict().items())


def test_a_stream_ticks_every_50_steps_and_its_knob_turns(tmp_path, host):
    stage = make_run(tmp_path, recipe={**RECIPE, "strategy": "stream"}, host=host).execute()["stages"][-1]
    assert [event["step"] for event in stage["events"]] == [50, 100, 150, 200]
    assert [event["value"] for event in stage["events"]] == pytest.approx([0.1 * 1.5**n for n in (1, 2, 3, 4)])
    assert all("kl" in row for row in stage["members"]["student"]["curve"])


def test_a_plan_is_json(tmp_path, host):
    run = make_run(tmp_path, recipe={**RECIPE, "strategy": "two-player"}, host=host)
    run.execute()
    for stage in run.stages.values():
        assert json.loads(run.keys.job(stage).to_text())["key"] == run.keys.of(stage)
