"""The GPU benchmark, but for its clock and its GPU: cases, checks, records, tables and the verdict on each goal."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench_cuda
import cuda_report
import losses_report
from competitors import Objective
from losses_cases import Case


class HostGauge:
    """Times on the CPU; what only a GPU has is made up."""

    device, backend, quick = "cpu", "reference", True

    def seconds(self, call, count):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    wall = seconds

    def launches(self, call):
        return 5

    def peak_bytes(self, call):
        call()
        return 24 * 4

    def graph(self, way, data):
        def replay():
            loss = way(*data)
            return loss.detach(), torch.autograd.grad(loss, data[0])[0]

        return replay, replay()

    def release(self):
        pass


CASES = [
    Case("12x7", "float32", Objective(cross_entropy=True), bench_cuda.AGAINST, goal=True),
    Case("12x7", "bfloat16", Objective(cross_entropy=True), bench_cuda.AGAINST, goal=True),
    Case("12x7", "float32", Objective(decoupled=False, normalize="none"), (*bench_cuda.STRONGEST, "eager liger")),
]
ABOUT = {"gpu": "a GPU", "gpu_gib": 80, "multiprocessors": 132, "cuda": "13.0", "isa": "cuda"}


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)


@pytest.fixture
def about():
    args = argparse.Namespace(
        device="cpu", shapes=["12x7"], dtypes=["float32"], modes=["class"], full=False, quick=True
    )
    return losses_report.machine(args, "cuda") | ABOUT | {"skipped": {}, "goals": []}


def test_every_case_gives_a_record_and_tables(about, tmp_path):
    records, skipped = bench_cuda.run_all(CASES, HostGauge(), time.monotonic() + 60)
    assert not skipped
    dkd, half, plain = records
    assert {"ours", "ours graph", "ours again", "eager textbook", "add", "copy"} <= dkd["ms"].keys()
    assert any(name.startswith("reduce") for name in dkd["ms"])
    assert dkd["peak_gradients"]["ours"] == pytest.approx(24 / 84)
    assert half["traffic"]["input"]["bytes"] == 168
    assert [r["traffic"]["designed"]["bytes"] // r["traffic"]["input"]["bytes"] for r in (dkd, plain)] == [7, 5]
    assert len(plain["notes"]) == ("eager liger" not in plain["ms"])  # not installed, or without a GPU
    about["goals"] = cuda_report.goals(records)
    args = argparse.Namespace(device="cuda", out=tmp_path, whole=True, full=False, default_allocator=False)
    losses_report.write(args, about, records, cuda_report.tables(about, records))
    (table,), (results,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    assert table.name == "losses-cuda-a-gpu.md"
    assert "DKD by class" in table.read_text()
    assert len(json.loads(results.read_text())["records"]) == 3


def test_a_case_that_fails_or_comes_too_late_costs_no_other(monkeypatch):
    class OneFails(HostGauge):
        def graph(self, way, data):
            if data[0].dtype == torch.bfloat16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().graph(way, data)

    records, skipped = bench_cuda.run_all(CASES[:2], OneFails(), time.monotonic() + 60)
    assert len(records) == 1
    assert skipped == {"DKD class + CE bfloat16 12x7": "short of memory"}
    assert bench_cuda.run_all(CASES[:1], HostGauge(), 0.0)[1] == {"DKD class + CE float32 12x7": "out of time"}


def record(shape, dtype, goal, ours_us, **times):
    """One of a made-up run, in which copy moves 3 TB/s."""
    rows, classes = map(int, shape.split("x"))
    objective = Objective(cross_entropy=True) if goal else Objective(decoupled=False, normalize="none")
    itemsize = 4 if dtype == "float32" else 2
    copy = 2 * rows * classes * itemsize / 3e12
    seconds = {"ours": ours_us, "ours again": ours_us, "ours graph": ours_us, **times}
    seconds = {name: [us * 1e-6] * 3 for name, us in seconds.items()} | {"add": [1.5 * copy] * 3, "copy": [copy] * 3}
    case = Case(shape, dtype, objective, (), goal)
    peaks = {"peak_gradients": {"ours": 1.04}, "launches": {"ours": 5}, "notes": []}
    return cuda_report.record(case, itemsize, seconds, {}, peaks)


def verdicts(records):
    return {goal["goal"]: goal["verdict"] for goal in cuda_report.goals(records)}


def test_goals_are_met_and_missed_by_what_was_measured():
    # 8192x21841 in bfloat16: 9 passes of 358 MB take 1073 us at the speed of copy
    fast = {"compile careful A": 4000.0, "compile careful B": 5000.0, "compile analytic": 3600.0}
    records = [
        record("8192x21841", "bfloat16", True, 1200, **fast, **{"eager careful A": 9000.0, "eager careful B": 9900.0}),
        record("4096x1000", "bfloat16", True, 24, **{"compile careful A": 100.0, "eager careful A": 300.0}),
        record("4096x1000", "bfloat16", False, 24, **{"compile careful A": 20.0, "eager liger": 50.0}),
    ]
    found = verdicts(records)
    assert found == {
        "bfloat16, compile careful, every shape": "met",
        "bfloat16, compile careful, geometric mean": "met",
        "bfloat16, eager careful, every shape": "met",
        "bfloat16, eager careful, geometric mean": "met",
        "bfloat16, designed traffic / copy, from 300 MB": "met",
        "bfloat16, graph replay, us": "met",
        "bfloat16, peak memory / gradient, from 4M elements": "met",
        "bfloat16, plain KD: the best other": "missed",
    }
    slower = verdicts([record("8192x21841", "bfloat16", True, 1300, **{"compile careful A": 3000.0})])
    assert slower["bfloat16, designed traffic / copy, from 300 MB"] == "missed"
    assert slower["bfloat16, compile careful, every shape"] == "missed"
    assert slower["bfloat16, graph replay, us"] == "-"


def test_a_way_that_was_left_out_at_a_shape_is_judged_where_it_ran():
    records = [
        record("4096x1000", "float32", True, 20, **{"eager careful A": 200.0}),
        record("8192x128256", "float32", True, 20000),
    ]
    assert verdicts(records)["float32, eager careful (1 of 2 shapes), every shape"] == "met"


def test_the_whole_run_has_every_shape_and_both_dtypes():
    chosen = bench_cuda.chosen_cases(
        argparse.Namespace(shapes=bench_cuda.SHAPES, dtypes=["float32", "bfloat16"], modes=["none", "class"])
    )
    assert len(chosen) == 16
    assert [case.goal for case in chosen] == [True] * 8 + [False] * 8
