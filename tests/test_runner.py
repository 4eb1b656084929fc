"""What a run promises: nothing is trained twice, nothing stale is used, a replay asks for the same stages."""

from __future__ import annotations

import dataclasses
import json

import pytest
from small import RECIPE, file_hash, make_run, weights

import kdcore
import kdcore.codec
from kdcore.errors import PlanError, PluginError, PreflightError
from kdcore.plugins import load_plugins

PLUGIN = """
import kdcore
from torch.nn import functional as F
from torch import nn

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("mine", Mine)

class Mine(nn.Module):
    needs = frozenset({"logits"})

    @classmethod
    def build(cls, shapes, options):
        return cls()

    def forward(self, student, teacher, batch):
        return F.mse_loss(student.logits, teacher.logits) * FACTOR
"""


def starts(run):
    return [record["name"] for record in run.journal.of("start")]


def test_a_repeated_run_trains_nothing(tmp_path):
    first = make_run(tmp_path)
    result = first.execute()
    again = make_run(tmp_path)
    repeated = again.execute()
    assert starts(again) == starts(first) == ["mlp-2 on labels", "mlp-2 -> mlp-1"]
    assert repeated["student"] == result["student"]
    assert all(stage["reused"] for stage in repeated["stages"])


def test_another_run_shares_the_teacher(tmp_path):
    make_run(tmp_path).execute()
    other = make_run(tmp_path, sets=["objective.1.temperature=2"], name="other")
    other.execute()
    assert starts(other) == ["mlp-2 -> mlp-1"]


def test_an_edited_plugin_loss_is_trained_again(tmp_path):
    file = tmp_path / "mine.py"
    recipe = {**RECIPE, "objective": [{"loss": "cross_entropy"}, {"loss": "mine"}]}
    hashes = set()
    for factor in (1, 2):
        file.write_text(PLUGIN.replace("FACTOR", str(factor)))
        run = make_run(tmp_path, recipe=recipe, host=load_plugins(files=[file]))
        run.execute()
        assert starts(run)[-1] == "mlp-2 -> mlp-1"
        hashes.add(file_hash(tmp_path / "run" / "student.safetensors"))
    assert starts(run) == ["mlp-2 on labels", "mlp-2 -> mlp-1", "mlp-2 -> mlp-1"]  # the teacher names no plugin loss
    assert len(hashes) == 2


@pytest.mark.long  # test_workers has it with a worker that is killed
def test_jobs_1_and_2_give_equal_weights(tmp_path):
    recipe = {**RECIPE, "controller": [{"name": "dskd"}]}
    for jobs in (1, 2):
        make_run(tmp_path / str(jobs), recipe=recipe, jobs=jobs).execute()
    for member in ("student", "teacher", "control"):
        assert weights(tmp_path / "1", member) == weights(tmp_path / "2", member)


def test_a_control_trained_alone_equals_the_one_trained_side_by_side(tmp_path):
    for mode in ("shared", "side-by-side"):
        controller = {"name": "dskd", "mode": mode, "patience": 99}
        make_run(tmp_path / mode, recipe={**RECIPE, "controller": [controller]}).execute()
    for member in ("control", "student"):
        assert weights(tmp_path / "shared", member) == weights(tmp_path / "side-by-side", member)


def test_dskd_decides_the_same_in_both_modes(tmp_path):
    found = {}
    for mode in ("shared", "side-by-side"):
        controller = {"name": "dskd", "mode": mode, "patience": 1}
        objective = [{"loss": "cross_entropy"}, {"loss": "kd", "weight": 50}]
        train = {"epochs": 6, "teacher": {"epochs": 1}}  # a poor teacher, heeded too much
        recipe = {**RECIPE, "train": train, "objective": objective, "controller": [controller]}
        stages = make_run(tmp_path / mode, recipe=recipe).execute()["stages"]
        found[mode] = [e for s in stages for e in s["events"] if e["kind"] == "set"]
    assert found["shared"] == found["side-by-side"]
    assert any(event["target"] == "student.kd.weight" and event["value"] == 0 for event in found["shared"])


def test_after_a_stop_the_teacher_no_longer_runs(tmp_path):
    def teacher_flops(fraction):
        recipe = {**RECIPE, "train": {"epochs": 4}, "controller": [{"name": "earlystop", "fraction": fraction}]}
        stages = make_run(tmp_path, recipe=recipe, name=str(fraction)).execute()["stages"]
        return stages[-1]["flops"]["teacher"]

    assert teacher_flops(0.25) * 3 == teacher_flops(0.75)


class Fickle:
    """A strategy that asks for something else every time."""

    Options = kdcore.Options
    calls = 0

    def plan(self, run, options):
        Fickle.calls += 1
        stage = run.label_only("teacher", run.model({"model": "mlp", "size": Fickle.calls}))
        yield stage
        return kdcore.Outcome(stage["teacher"])


def test_a_strategy_that_does_not_replay_is_refused(tmp_path):
    host = load_plugins()
    host.catalog.entries["strategy"]["distill"][0].__dict__["target"] = Fickle
    make_run(tmp_path, host=host).execute()
    with pytest.raises(PlanError, match=r"step 1 was \['mlp-1 on labels'\], now it is \['mlp-2 on labels'\]"):
        make_run(tmp_path, host=host).execute()


def test_a_strategy_never_sees_the_test_split(tmp_path):
    run = make_run(tmp_path)
    run.execute()
    for stage in run.stages.values():
        for member in run._result(stage).members.values():
            names = [*vars(member), *(key for row in member.curve for key in row)]
            assert not [name for name in names if "test" in name]


def test_the_weights_file_counts_by_content_not_by_path(tmp_path):
    make_run(tmp_path).execute()
    source = next(tmp_path.glob("store/results/*/teacher.safetensors"))
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(source.read_bytes())
        recipe = {**RECIPE, "teacher": {**RECIPE["teacher"], "weights": str(tmp_path / f"{name}.safetensors")}}
        run = make_run(tmp_path, recipe=recipe, name=name)
        run.execute()
    assert starts(run) == []


def test_a_teacher_at_chance_is_a_loud_warning_and_strict_stops(tmp_path):
    sets = ["train.teacher={lr=1e-6, epochs=1}"]
    run = make_run(tmp_path, sets=sets)
    result = run.execute()
    assert any("at chance" in text for text in result["warnings"])
    assert any("at chance" in event["text"] for event in run.console.kinds("warning"))
    assert "at chance" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(PreflightError, match="at chance"):
        make_run(tmp_path, sets=sets, strict=True).execute()
    with pytest.raises(PreflightError, match="at chance"):
        make_run(tmp_path / "fresh", sets=sets, strict=True).execute()


def test_a_teacher_below_the_control_is_a_loud_warning(tmp_path):
    recipe = {**RECIPE, "train": {"epochs": 8, "teacher": {"epochs": 1}}, "controller": [{"name": "dskd"}]}
    result = make_run(tmp_path, recipe=recipe).execute()
    assert any("not above the label-only control" in text for text in result["warnings"])


def test_class_normalised_losses_alone_are_a_loud_warning(tmp_path):
    def warned(*losses):
        objective = [{"loss": name, **options} for name, options in losses]
        folder = tmp_path / str(len(objective)) / objective[-1]["loss"]
        warnings = make_run(folder, recipe={**RECIPE, "objective": objective}).execute()["warnings"]
        return any("leaves the scale and offset of every class open" in text for text in warnings)

    by_class = ("kd", {"normalize": "class"})
    assert warned(by_class)
    assert not warned(by_class, ("cross_entropy", {}))
    assert not warned(by_class, ("dkd", {}))


def test_result_json_holds_what_it_promises(tmp_path):
    run = make_run(tmp_path, recipe={**RECIPE, "controller": [{"name": "dskd"}]})
    run.execute()
    result = json.loads((tmp_path / "run" / "result.json").read_bytes())
    for role in ("student", "teacher", "control"):
        assert set(result[role]) >= {"model", "test_accuracy", "monitor_accuracy", "params"}
    assert result["protocol"]["selection"] == "last"
    assert "decided nothing" in result["protocol"]["text"]
    assert result["versions"]["torch"]
    assert {"name": "dskd", "distribution": "kdcore", "version": kdcore.__version__} in result["plugins"]


def test_keep_best_delivers_the_weights_that_were_best_on_the_monitor_split(tmp_path):
    sets = ["train.lr=2.0", "train.schedule=constant", "train.epochs=6"]
    last = make_run(tmp_path, sets=sets, name="last").execute()
    best = make_run(tmp_path, sets=[*sets, "train.keep=best"], name="best").execute()
    assert best["protocol"]["selection"] == "best"
    changed = file_hash(tmp_path / "best/student.safetensors") != file_hash(tmp_path / "last/student.safetensors")
    assert changed == (last["student"]["best_monitor_accuracy"] > last["student"]["monitor_accuracy"])


def test_observers_see_every_event_and_change_nothing(tmp_path):
    seen = []

    class Observer:
        @kdcore.hookimpl
        def kdcore_epoch_finished(self, run, stage, epoch, metrics):
            seen.append(
                (stage["name"], epoch, metrics["teacher" if "labels" in stage["name"] else "student"]["accuracy"])
            )

        @kdcore.hookimpl
        def kdcore_run_finished(self, outcome):
            seen.append(outcome["student"]["model"])

    host = load_plugins()
    host.manager.register(Observer(), "observer")
    host.origins["observer"] = host.origins["core"]
    make_run(tmp_path / "watched", host=host).execute()
    make_run(tmp_path / "alone").execute()
    assert len(seen) == 5
    assert seen[-1] == "mlp-1"
    assert weights(tmp_path / "watched") == weights(tmp_path / "alone")


GENERATIONS = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.strategy("mine", Mine)

class Mine:
    Options = kdcore.Options

    def plan(self, run, options):
        stage = run.label_only("teacher", run.model({"model": "mlp", "size": SIZE}))
        yield stage
        return kdcore.Outcome(stage["teacher"])
"""


def test_an_edited_strategy_is_no_failed_replay(tmp_path):
    file = tmp_path / "generations.py"
    for size in (1, 2):
        file.write_text(GENERATIONS.replace("SIZE", str(size)))
        run = make_run(tmp_path, recipe={**RECIPE, "strategy": "mine"}, host=load_plugins(files=[file]))
        run.execute()
    assert starts(run) == ["mlp-1 on labels", "mlp-2 on labels"]


SERIES = """
from pathlib import Path
import kdcore

VERSION = NUMBER

@kdcore.hookimpl
def kdcore_register(registry):
    registry.strategy("series", Series)

class Series:
    Options = kdcore.Options

    def plan(self, run, options):
        for size in Path(__file__).with_suffix(".txt").read_text().split():
            stage = run.label_only("teacher", run.model({"model": "mlp", "size": int(size), "width": 8}))
            yield stage
            yield kdcore.Choice(f"{size} is trained", stage["teacher"])
        return kdcore.Outcome(stage["teacher"])
"""


def series(root, version, sizes, killed=""):
    """A run of the strategy's code ``version``, which asks for these sizes and dies at ``killed``."""
    (root / "series.py").write_text(SERIES.replace("NUMBER", str(version)))
    (root / "series.txt").write_text(sizes)
    run = make_run(root, recipe={**RECIPE, "strategy": "series"}, host=load_plugins(files=[root / "series.py"]))
    handle = run.console.handle

    def die(event):
        handle(event)
        if event["kind"] == "asked" and event["stages"][0]["members"]["teacher"]["model"] == killed:
            raise KeyboardInterrupt

    run.console.handle = die
    return run


def test_a_strategy_that_was_edited_and_then_killed_goes_on_as_edited(tmp_path):
    """What its first version asked for binds nobody, wherever the second one is killed; what that asked for does."""
    series(tmp_path, 1, "1 2 3 6").execute()
    for killed in ("mlp-2", "mlp-4", "mlp-5"):  # the first of these both versions ask for
        with pytest.raises(KeyboardInterrupt):
            series(tmp_path, 2, "1 2 4 5", killed).execute()
    for _ in range(2):
        run = series(tmp_path, 2, "1 2 4 5")
        assert [choice["text"] for choice in run.execute()["choices"]] == [f"{n} is trained" for n in (1, 2, 4, 5)]
    assert [record["text"][0] for record in run.journal.of("choice")] == [*"123645"]
    with pytest.raises(PlanError, match=r"step 4 was \['mlp-5 on labels'\], now it is \['mlp-6 on labels'\]"):
        series(tmp_path, 2, "1 2 4 6").execute()


METRIC = """
import kdcore
import torch

@kdcore.hookimpl
def kdcore_register(registry):
    registry.metric("mine", lambda student, teacher, target: torch.full_like(target, VALUE, dtype=torch.float32))
    registry.controller("by-mine", ByMine)

class ByMine:
    Options = kdcore.Options
    needs = frozenset({"mine"})

    def __init__(self, options):
        pass

    def decide(self, view):
        return kdcore.labels_alone(view, "student", "mine is high") if view.now("student", "mine") == 1 else []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
"""


def test_an_edited_metric_that_a_controller_needs_is_measured_again(tmp_path):
    file, events = tmp_path / "measure.py", []
    for value in (0, 1):
        file.write_text(METRIC.replace("VALUE", str(value)))
        recipe = {**RECIPE, "controller": [{"name": "by-mine"}]}
        result = make_run(tmp_path, recipe=recipe, host=load_plugins(files=[file])).execute()
        events.append(len(result["stages"][-1]["events"]))
    assert events == [0, 2]


def test_a_plugin_that_is_edited_while_the_run_goes_on_poisons_no_result(tmp_path):
    file = tmp_path / "heeded.py"
    file.write_text(PLUGIN.replace("FACTOR", "1"))
    recipe = {**RECIPE, "objective": [{"loss": "cross_entropy"}, {"loss": "mine"}]}
    run = make_run(tmp_path, recipe=recipe, host=load_plugins(files=[file]))
    show = run.console.handle

    def edit(event):
        show(event)
        if event["kind"] == "stage_finished":
            file.write_text(PLUGIN.replace("FACTOR", "0"))

    run.console.handle = edit
    with pytest.raises(PluginError, match="'heeded' was edited while the run went on"):
        run.execute()
    assert len(run.store.stored()) == 1


def test_a_weights_file_that_changed_counts_anew_in_the_same_process(tmp_path):
    make_run(tmp_path).execute()
    source = next(tmp_path.glob("store/results/*/teacher.safetensors"))
    weights = source.read_bytes()
    given = tmp_path / "given.safetensors"
    keys = []
    for content in (weights, weights[:-1] + bytes([weights[-1] ^ 1])):
        given.write_bytes(content)
        recipe = {**RECIPE, "teacher": {**RECIPE["teacher"], "weights": str(given)}}
        run = make_run(tmp_path, recipe=recipe, name="given")
        keys.append(run.keys.of(run.view.label_only("teacher", run.view.teacher)))
    assert keys[0] != keys[1]


def test_what_is_reported_are_the_weights_that_are_delivered(tmp_path):
    sets = ["train.lr=2.0", "train.schedule=constant", "train.epochs=6", "train.keep=best"]
    result = make_run(tmp_path, sets=sets).execute()
    for role in ("student", "teacher"):
        assert result[role]["test_accuracy"] == result[role]["test_accuracy_at_best"]
        assert result[role]["monitor_accuracy"] == result[role]["best_monitor_accuracy"]
    given = {**RECIPE, "teacher": {**RECIPE["student"], "weights": str(tmp_path / "run" / "student.safetensors")}}
    again = make_run(tmp_path, recipe=given, name="given").execute()
    assert again["teacher"]["test_accuracy"] == result["student"]["test_accuracy"]


def test_a_member_that_is_only_used_refers_to_where_it_came_from(tmp_path):
    view = make_run(tmp_path).view
    teacher = view.label_only("teacher", view.teacher)
    student = view.distilled(view.student, teacher["teacher"])
    assert student["teacher"] == teacher["teacher"]


def test_a_field_at_its_default_is_not_in_the_key():
    plain = kdcore.Term("kd")
    assert kdcore.codec.encode(plain, str) == {"loss": "kd"}
    assert kdcore.codec.encode(kdcore.Term("kd", weight=2.0), str) == {"loss": "kd", "weight": 2.0}


def test_a_resumed_run_keeps_its_threads_and_jobs(tmp_path):
    run = make_run(tmp_path, jobs=2)
    run.execute()
    saved = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert (saved["jobs"], saved["threads"]) == (2, 1)


def test_gc_keeps_what_runs_elsewhere_use(tmp_path, capsys):
    from kdcore.cli.drive import collect

    run = make_run(tmp_path / "here")
    run.execute()
    collect(tmp_path / "elsewhere", tmp_path / "here" / "store", dry=False)
    assert len(run.store.stored()) == 2


def test_a_plugin_that_the_recipe_does_not_name_may_come_and_go(tmp_path):
    make_run(tmp_path).execute()
    file = tmp_path / "bystander.py"
    file.write_text(PLUGIN.replace("FACTOR", "1"))
    make_run(tmp_path, host=load_plugins(files=[file])).execute()


def test_a_student_far_below_its_control_is_a_warning(tmp_path):
    objective = [{"loss": "cross_entropy"}, {"loss": "kd", "weight": 200}]
    train = {"epochs": 6, "teacher": {"epochs": 1, "lr": 1e-3}}
    controller = [{"name": "dskd", "patience": 99}]
    recipe = {**RECIPE, "train": train, "objective": objective, "controller": controller}
    result = make_run(tmp_path, recipe=recipe).execute()
    assert any(text.startswith("the student ends at") for text in result["warnings"])


def test_another_version_of_a_plugin_that_the_recipe_names_asks_for_a_flag(tmp_path):
    make_run(tmp_path).execute()
    host = load_plugins()
    host.origins["distill"] = dataclasses.replace(host.origins["distill"], version="9.9")
    changed = make_run(tmp_path, host=host)
    with pytest.raises(PluginError, match=r"other plugins \(changed: distill kdcore .*, distill kdcore 9.9\)"):
        changed.execute()
    changed = make_run(tmp_path, host=host)
    changed.allow_plugin_change = True
    changed.execute()
    make_run(tmp_path, host=host).execute()  # now these are the run's plugins
