"""Outputs of frozen members that are stored: what they hold, when they are made again, and when they are refused."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import RECIPE, die_at_step_30, make_run, weights

from kdcore.errors import Interrupted, PlanError, StorageError
from kdcore.outputs import Outputs
from kdcore.plan import Cache, Member
from kdcore.plugins import load_plugins
from kdcore.store import Store
from kdcore.training import cache
from kdcore.training.session import open_session

SHIFTED = {**RECIPE, "data": {**RECIPE["data"], "shift": 1}}
TWO_VIEWS = {**SHIFTED, "cache": {"views": 2}, "train": {"epochs": 4}}


ALONE = """
    import kdcore

    @kdcore.hookimpl
    def kdcore_register(registry):
        registry.controller("alone", Alone)

    class Alone:
        Options = kdcore.Options
        needs = frozenset()

        def __init__(self, options):
            pass

        def decide(self, view):
            return kdcore.labels_alone(view, "student", "it may") if view.tick == 1 else []

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass
"""
BRIGHT = """
    import kdcore

    @kdcore.hookimpl
    def kdcore_register(registry):
        registry.transform("bright", Bright)

    class Bright:
        Options = kdcore.Options

        def __init__(self, options):
            self.knobs = {"light": 1.0}

        def __call__(self, batch, random):
            return batch
"""
IMAGES = 1295  # of digits' training split, without test and monitor split


def parts(root):
    return sorted(path for path in root.glob("store/caches/*/*") if path.is_dir())


@pytest.fixture(scope="module")
def ran(tmp_path_factory, host):
    """A run with two views."""
    root = tmp_path_factory.mktemp("ran")
    made = make_run(root, recipe=TWO_VIEWS, host=host)
    return root, made.execute()


@pytest.fixture
def session(tmp_path, host):
    """Opens the stage of a plan with an untrained teacher."""

    def opened(recipe=TWO_VIEWS, **changes):
        made = make_run(tmp_path, recipe=recipe, host=host)
        view = made.view
        members = {
            "student": Member(view.student, terms=view.objective, optimizer=view.optimizer),
            "teacher": Member(view.teacher),
        }
        stage = made.view.label_only("student", view.student)
        stage = replace(stage, members=members, data=replace(view.data, **changes))
        job, load = made.keys.job(stage), made.context.load
        return open_session(job, host.catalog, load(stage.data), Store(job.settings.store), lambda event: None, {})

    return opened


# ---------------------------------------------------------------- what is read


def test_stored_outputs_are_what_the_teacher_gives_for_each_batch(session):
    stage = session()
    stage.begin_tick()
    for step in range(2 * stage.source.steps_per_epoch + 1):
        batch = stage.source.batch(step)
        stored = stage.context.source("teacher", batch).logits
        live = stage.context.forward("teacher", batch.inputs).logits
        assert stored.dtype == live.dtype
        torch.testing.assert_close(stored, live, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("top", [0, 3])
def test_what_will_lie_on_the_device_is_known_before(session, top):
    stage = session(cache=Cache(views=2, top=top))
    stage.begin_tick()
    parts = stage.learners["teacher"].cached.parts
    held = sum(tensor.nbytes for view in parts for part in view for tensor in part.values())
    assert cache.resident_bytes(stage, stage.stage.data.cache) == held


def test_half_precision_loses_nothing_by_being_stored(session, monkeypatch):
    stage = session()
    stage.job = replace(stage.job, settings=replace(stage.job.settings, precision="bfloat16"))
    stage.begin_tick()
    batch = stage.source.batch(0)
    stored = stage.context.source("teacher", batch).logits
    live = stage.context.forward("teacher", batch.inputs).logits
    assert stored.dtype == torch.bfloat16
    torch.testing.assert_close(stored, live, rtol=2**-7, atol=1e-3)  # a unit in the last place, for another batch


def test_views_repeat_and_differ(session):
    source = session().source
    index = torch.arange(32)
    first, second, third = (next(source.walk([index], epoch)).inputs for epoch in range(3))
    assert first.equal(third)
    assert not first.equal(second)


def test_the_teacher_runs_once_a_view_and_never_again(ran, host):
    root, found = ran
    stage = found["stages"][-1]
    assert stage["flops"]["teacher"] == 2 * IMAGES * stage["members"]["teacher"]["flops"]
    before = {path: path.stat().st_mtime_ns for path in parts(root)}
    made = make_run(root, recipe={**TWO_VIEWS, "student": {"model": "mlp", "size": 3}}, host=host, name="other")
    other = made.execute()["stages"][-1]
    assert other["flops"]["teacher"] == stage["flops"]["teacher"], "a cost does not depend on who came first"
    assert {path: path.stat().st_mtime_ns for path in parts(root)} == before


def test_a_teacher_is_trained_as_without_a_cache_and_a_control_sees_the_students_views(host, tmp_path):
    cached, plain = (make_run(tmp_path, recipe=recipe, host=host) for recipe in (TWO_VIEWS, SHIFTED))
    teachers = [made.view.label_only("teacher", made.view.teacher) for made in (cached, plain)]
    assert teachers[0].data == teachers[1].data
    assert cached.view.label_only("control", cached.view.student).data.cache.views == 2


def test_features_are_stored_with_the_logits(tmp_path, host):
    recipe = {
        **TWO_VIEWS,
        "teacher": {"model": "cnn", "size": 2},
        "student": {"model": "cnn", "size": 1},
        "objective": [{"loss": "cross_entropy"}, {"loss": "fitnet", "student": ["stage1"], "teacher": ["stage1"]}],
        "train": {"epochs": 1},
    }
    make_run(tmp_path, recipe=recipe, host=host, sets=["channels_last=true"]).execute()
    rows = cache.load_file(parts(tmp_path)[0] / "rows.safetensors")
    assert set(rows) == {"logits", "tap.stage1"}
    assert rows["tap.stage1"].dtype == torch.float16


@pytest.mark.parametrize("bound", ["PART", "PART_BYTES"])
def test_outputs_that_do_not_fit_on_the_device_are_read_from_their_parts(session, monkeypatch, bound):
    monkeypatch.setattr(cache, bound, 100 * (1 if bound == "PART" else 20))  # samples, or their logits' bytes
    whole = session()
    whole.begin_tick()
    monkeypatch.setattr(cache, "RESIDENT", 0)
    spread = session()
    spread.begin_tick()
    assert len(spread.learners["teacher"].cached.parts[0]) == 13
    index = torch.randperm(1000)
    one, other = (stage.learners["teacher"].cached.outputs(index, 1).logits for stage in (whole, spread))
    assert one.equal(other)


@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.integers(1, 39))
def test_the_largest_logits_keep_their_probabilities_and_the_rest_theirs_together(seed, classes, top):
    logits = torch.randn(5, classes, generator=torch.Generator().manual_seed(seed)) * 4
    rows = cache.stored(Outputs(logits), top)
    cached = cache.Cached([[rows]], classes, torch.device("cpu"), 5)
    found = cached.outputs(torch.arange(5), 0).logits.float().softmax(1)
    wanted = logits.softmax(1)
    if top >= classes:
        assert set(rows) == {"logits"}
    else:
        largest = logits.topk(top).indices
        torch.testing.assert_close(found.gather(1, largest), wanted.gather(1, largest), rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    assert math.isfinite(found.sum())


# ---------------------------------------------------------------- damage, kills, other teachers


def test_a_flipped_bit_is_found_and_its_part_made_again(ran, host, tmp_path):
    root, _ = ran
    shutil.copytree(root / "store", tmp_path / "store")
    again = partial(make_run, tmp_path, recipe=TWO_VIEWS, host=host, name="again")
    shutil.rmtree(tmp_path / "store" / "results" / again().keys.of(_last(again())))
    damaged = parts(tmp_path)[1] / "rows.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    made = again()
    made.execute()
    assert any("damaged" in event["text"] for event in made.console.kinds("warning"))
    assert weights(tmp_path) == weights(root)


def _last(made):
    teacher = made.view.label_only("teacher", made.view.teacher)
    return made.view.distilled(made.view.student, teacher["teacher"])


def test_filling_goes_on_where_it_was_stopped(session, monkeypatch):
    monkeypatch.setattr(cache, "PART", 512)
    stage = session()
    asked = iter([0] * 4 + [2] * 100)
    stage.stopped = lambda: next(asked)
    with pytest.raises(Interrupted):
        stage.begin_tick()
    root = stage.store.root.parent
    there = {path: path.stat().st_mtime_ns for path in parts(root)}
    assert 0 < len(there) < 6
    stage = session()
    stage.begin_tick()
    assert there.items() <= {path: path.stat().st_mtime_ns for path in parts(root)}.items()
    assert stage.learners["teacher"].stored == 2 * IMAGES


def test_another_teachers_outputs_are_refused(session):
    stage = session()
    stage.begin_tick()
    path = parts(stage.store.root.parent)[0]
    rows = cache.load_file(path / "rows.safetensors")
    shutil.rmtree(path)
    stage.store.save_part(
        path.parent.name, path.name, {"rows.safetensors": cache.save({"logits": rows["logits"] * 1.02})}
    )
    with pytest.raises(StorageError, match=r"not what the member gives now.*Remove the folder"):
        session().begin_tick()


def test_a_run_that_waits_for_anothers_cache_says_so(ran, host, tmp_path, session):
    root, _ = ran
    shutil.copytree(root / "store", tmp_path / "store")
    stage, told = session(), []
    stage.emit = told.append
    with stage.store.lease(cache._key(stage, stage.learners["teacher"]), told.append):
        asked = iter([0, 0, 0, 15])
        stage.stopped = lambda: next(asked)
        with pytest.raises(Interrupted):
            stage.begin_tick()
    assert [event["kind"] for event in told] == ["waiting"]


def test_passes_that_stored_outputs_stand_for_count_once_though_a_run_went_on_without_its_teacher(
    tmp_path, plugin_file
):
    host = load_plugins(files=[plugin_file("alone", ALONE)])
    recipe = {**TWO_VIEWS, "controller": [{"name": "alone"}], "execute": {"log_every": 5, "checkpoint_seconds": 0}}
    whole = make_run(tmp_path / "whole", recipe=recipe, host=host).execute()
    die_at_step_30(make_run(tmp_path / "killed", recipe=recipe, host=host))
    killed = make_run(tmp_path / "killed", recipe=recipe, host=host).execute()
    assert killed["stages"][-1]["flops"] == whole["stages"][-1]["flops"]
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_other_weights_have_a_cache_of_their_own(session):
    for seed in (0, 1):
        stage = session({**TWO_VIEWS, "seed": seed})
        stage.begin_tick()
    assert len({path.parent for path in parts(stage.store.root.parent)}) == 2


def test_gc_removes_them(ran, tmp_path):
    root, _ = ran
    shutil.copytree(root / "store", tmp_path / "store")
    removed = Store(tmp_path / "store").collect(set())
    assert any(path.parent.name == "caches" for path in removed)
    assert not parts(tmp_path)


# ---------------------------------------------------------------- what has no cache


@pytest.mark.parametrize(
    "transform", [{"name": "mixup"}, {"name": "cutmix"}, {"name": "views", "strong": ["flip"]}], ids=lambda t: t["name"]
)
def test_transforms_that_look_at_other_samples_are_refused_before_a_teacher_is_trained(tmp_path, host, transform):
    recipe = {**TWO_VIEWS, "data": {**TWO_VIEWS["data"], "transforms": [transform]}}
    with pytest.raises(PlanError, match="cache: a transform mixes the samples of a batch, or makes several of one"):
        make_run(tmp_path, recipe=recipe, host=host).execute()
    assert not list(tmp_path.glob("store/results/*"))


def test_knobs_that_stored_outputs_would_not_follow_are_refused_before_a_teacher_is_trained(tmp_path, plugin_file):
    recipe = {**TWO_VIEWS, "data": {**TWO_VIEWS["data"], "transforms": [{"name": "bright"}]}}
    made = make_run(tmp_path, recipe=recipe, host=load_plugins(files=[plugin_file("bright", BRIGHT)]))
    with pytest.raises(PlanError, match=r"cache: data.light is a knob that may change .* Leave cache out"):
        made.execute()
    assert not list(tmp_path.glob("store/results/*"))


def test_a_source_without_samples_is_refused(session):
    stage = session()
    stage.source = object()
    with pytest.raises(PlanError, match=r"cache: source .* cannot give the samples of a view"):
        stage.begin_tick()
