"""The benchmark of whole steps: a short run on the CPU, records, goals and the page by made-up times."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench_training
import torch
import training_report
import training_ways
from bench_training import EndedError, Field
from training_costs import PARTS
from training_report import EPOCH

MODELS = ["--teacher", "cifar_resnet8", "--student", "cifar_resnet8"]
TINY = [*MODELS, "--samples", "400", "--rounds", "1", "--threads", "1"]
SECONDS = {"published": [8.0, 6.0], "live": [2.0, 2.0], "cached": [0.5, 0.5], "live x 3": [3.0, 3.0]}


def cost(**more):
    return {"peak_mb": 100.0, "shares": {"convolution": 0.7, "add": 0.3}, **more}


def made(batch=256, seconds=SECONDS, **more):
    parts = {"data": 0.05, "teacher": 0.75, "loss": 0.02, "other": 0.18}
    costs = {name: cost(**({} if name == "published" else {"parts": parts}), **more) for name in seconds}
    return training_report.record(batch, seconds, costs, {})


def about(**changes):
    args = bench_training.parse(TINY)
    return {**bench_training.machine(args), "left_out": {}, **changes}


def timed(ways, folder, monkeypatch, *options):
    """The page and the JSON of a run with short samples."""
    monkeypatch.setattr(bench_training, "SAMPLE_SECONDS", 0.05)
    bench_training.main([*TINY, "--ways", ways, "--out", str(folder), *options])
    (text,), (results,) = folder.glob("training-cpu-*.md"), folder.glob("training-cpu-*.json")
    return text.read_text(), json.loads(results.read_text())


def test_a_run_writes_rates_and_shares(tmp_path, monkeypatch):
    text, results = timed("live, eager", tmp_path, monkeypatch, "--batches", "8")
    (found,) = results["records"]
    assert found["images_per_second"]["live, eager"]["median"] > 0
    cost = found["costs"]["live, eager"]
    assert cost["peak_mb"] > 0
    assert cost["shares"]
    assert cost["parts"].keys() == {*PARTS, "other"}
    assert sum(cost["parts"].values()) == pytest.approx(1, abs=1e-3)
    assert "## Batch 8, 1 rounds" in text
    assert "| live, eager |" in text


@pytest.mark.long
def test_every_way_and_students_under_one_teacher_are_timed(tmp_path, monkeypatch):
    ways = ("live", "cached", *(way for way in bench_training.WAYS if way.startswith(("published", "ten lines"))))
    text, results = timed(";".join(ways), tmp_path, monkeypatch, "--batches", "8,256", "--students", "2")
    small, large = results["records"]
    assert small["images_per_second"].keys() == small["costs"].keys() == set(ways)
    assert small["ratios"].keys() == {*ways} - {"cached"}
    assert small["costs"]["cached"]["filling"] > 0
    assert small["costs"]["live"]["filling"] is None
    assert "Rates of the cached way leave out filling: " in text
    assert large["images_per_second"].keys() == {*ways, "live x 2"}
    assert [row["students"] for row in large["students"]] == [1, 2]
    assert "### Students under one teacher" in text
    assert "### Goals" in text


@pytest.mark.long
def test_torchdistill_is_timed_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("torchdistill")
    _, results = timed("torchdistill", tmp_path, monkeypatch, "--batches", "8")
    assert results["about"]["torchdistill"]
    assert results["records"][0]["costs"]["torchdistill"]["shares"]


@pytest.mark.long
def test_a_run_in_which_every_way_ends_writes_why_and_fails(tmp_path, monkeypatch, capfd):
    with pytest.raises(SystemExit, match="no way was timed at batch 8"):
        timed("ten lines", tmp_path, monkeypatch, "--batches", "8", "--teacher", "nobody")
    assert "Traceback" in capfd.readouterr().err
    (text,) = tmp_path.glob("*.md")
    assert "Left out: ten lines (KeyError: 'nobody')." in text.read_text()


class Runner:
    """Stands for a process that dies at its second sample, if it is to."""

    def __init__(self, name, dies=False):
        self.name, self.dies, self.calls = name, dies, 0

    def sample(self):
        self.calls += 1
        if self.dies and self.calls == 2:
            raise EndedError("OutOfMemoryError: CUDA out of memory")
        return self.calls


def test_a_way_that_ends_is_left_out_with_its_reason_and_the_others_race_on():
    field = Field([Runner("one"), Runner("two", dies=True), Runner("three")])
    found = [field.each(Runner.sample) for _ in range(3)]
    assert found == [{"one": 1, "two": 1, "three": 1}, {"one": 2, "three": 2}, {"one": 3, "three": 3}]
    assert field.out == {"two": "OutOfMemoryError: CUDA out of memory"}
    page = training_report.page(about(), [{**made(64), "left_out": field.out}])
    assert "Left out: two (OutOfMemoryError: CUDA out of memory)." in page


def test_ways_of_kdcore_are_timed_in_the_state_of_a_stage_and_fill_a_cache_anew(tmp_path):
    models = {"teacher": "cifar_resnet8", "student": "cifar_resnet8", "folder": str(tmp_path)}
    sizes = {"batch": 8, "samples": 400, "threads": torch.get_num_threads(), "workers": 0}
    setting = training_ways.Setting(way="cached", device="cpu", **models, **sizes)
    with training_ways.STAGE:
        step = training_ways.KdcoreStep(setting, cache=True, compiled=False)
        step()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert step.filling() > 0
    ours, again = (list((folder / "caches").iterdir()) for folder in (tmp_path, tmp_path / "again"))
    assert [path.name for path in ours] == [path.name for path in again]


def test_ratios_are_medians_of_those_within_a_round():
    found = made()
    assert found["rounds"] == 2
    assert found["images_per_second"]["cached"]["median"] == 512
    assert found["ratios"]["published"]["live"] == {"median": 3.5, "p20": 3.2, "p80": 3.8}
    assert found["ratios"].keys() == {"published", "live"}


def test_students_are_compared_with_as_many_runs_of_one():
    one, three = made()["students"]
    assert [one["students"], three["students"]] == [1, 3]
    assert one["runs_over_together"]["median"] == 1
    assert three["runs_over_together"]["median"] == three["most"] == 2
    assert three["step_ms"]["median"] == 3000
    assert three["student_image_us"]["median"] == pytest.approx(3e6 / 256 / 3, rel=1e-3)
    assert made(seconds={"live": [1.0]})["students"] == []


def test_goals_are_judged_where_their_ways_were_timed():
    found = {goal["goal"]: (goal["figure"], goal["verdict"]) for goal in training_report.goals(made(), about())}
    assert found == {
        "live / published": (3.5, "met"),
        "live / ten lines": (None, "not measured"),
        "cached / published": (14, "met"),
        "cached / ten lines, student alone": (None, "not measured"),
        "three students under one teacher / three runs": (2, "met"),
    }
    slower = training_report.goals(made(seconds={**SECONDS, "live x 3": [3.6, 3.6]}), about())
    assert slower[-1]["verdict"] == "missed"
    assert training_report.goals(made(64), about()) == []


@pytest.mark.parametrize(("busy", "verdict"), [(0.96, "met"), (0.9, "missed")])
def test_on_a_gpu_the_loss_may_take_little_and_the_device_must_be_busy(busy, verdict):
    gpu = about(goals_at=1024, device="cuda", gpu="a GPU")
    found = {goal["goal"]: goal["verdict"] for goal in training_report.goals(made(1024, busy=busy), gpu)}
    assert found["live / published"] == "missed"
    assert found["loss, share of a live step"] == "met"
    assert found["GPU busy, share of a live step"] == verdict
    page = training_report.page(gpu, [made(1024, busy=busy)])
    assert "cached, batch 128, seconds | at most 2 |  | not measured |" in page
    assert "| loss, share of a live step | at most 0.03 | 0.02 | met |" in page
    assert f"| {busy:.0%} |" in page


@pytest.mark.parametrize(("step", "verdict"), [(0.004, "met"), (0.006, "missed")])
def test_the_epoch_of_a_small_student_has_a_run_of_its_own(step, verdict):
    gpu = about(goals_at=1024, device="cuda", gpu="a GPU", teacher=EPOCH["teacher"], student=EPOCH["student"])
    (goal,) = training_report.goals(made(128, {"cached": [step] * 3}), gpu)
    assert goal["figure"] == pytest.approx(50_000 / 128 * step, rel=1e-3)
    assert goal["verdict"] == verdict


def test_a_page_judges_goals_at_their_batch_alone_and_names_what_was_left_out():
    page = training_report.page(about(left_out={"torchdistill": "not installed"}), [made(64), made(256)])
    assert page.count("### Goals") == 1
    assert page.index("## Batch 256") < page.index("### Goals")
    assert "Left out: torchdistill (not installed)." in page
    assert "The machine's load before: " in page
    assert "| 3 | 3000 (3000-3000) |" in page


def test_a_way_whose_package_is_missing_is_left_out_with_a_word(monkeypatch, capsys):
    monkeypatch.setitem(bench_training.NEEDS, "torchdistill", "torchdistill_is_not_there")
    found = bench_training.missing(["live", "torchdistill"], "cpu")
    assert found.keys() == {"torchdistill"}
    assert "torchdistill is left out, cannot be imported: ModuleNotFoundError" in capsys.readouterr().err


def test_a_package_that_fails_while_it_is_imported_is_left_out_too(tmp_path, monkeypatch):
    (tmp_path / "too_old_for_torch.py").write_text("raise AttributeError('gone')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(bench_training.NEEDS, "torchdistill", "too_old_for_torch")
    found = bench_training.missing(["torchdistill"], "cpu")
    assert found == {"torchdistill": "cannot be imported: AttributeError: gone"}


def test_a_gpu_has_whole_epochs_and_no_setting_of_malloc():
    assert bench_training.parse(["--device", "cuda"]).samples == 50_000
    assert bench_training.parse([]).samples == 8192
    kept = "ten lines, compiled, kept memory"
    assert bench_training.missing(["live", kept], "cuda").keys() == {kept}
    assert bench_training.missing(["live", kept], "cpu") == {}


def test_rounds_end_with_the_minutes_but_never_before_the_third():
    assert len(list(bench_training.rounds(bench_training.parse(["--minutes", "0", "--rounds", "9"])))) == 3
    assert len(list(bench_training.rounds(bench_training.parse(["--minutes", "9", "--rounds", "2"])))) == 2
    assert len(list(bench_training.rounds(bench_training.parse(["--minutes", "9", "--rounds", "9"])))) == 9


def test_several_students_are_timed_at_the_goals_batch_of_a_whole_run():
    whole, part = bench_training.parse([]), bench_training.parse(["--ways", "published;live"])
    names = [setting.name for setting in bench_training.settings(256, whole)]
    assert names == [*bench_training.WAYS, "live x 2", "live x 3", "live x 4", "live x 8"]
    assert len(bench_training.settings(64, whole)) == len(bench_training.WAYS)
    assert len(bench_training.settings(256, part)) == 2
