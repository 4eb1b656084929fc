"""Data parallel runs: two processes train what one does, and end together, however one of them ends."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Command, command, environment
from safetensors.torch import load_file
from small import RECIPE, weights

import kdcore as api
from kdcore.errors import DataError, RecipeError
from kdcore.job import Settings
from kdcore.training import parts
from kdcore.training.world import World

TEXT = """
seed = 0
threads = 1
device = "cpu"
data = { name = "digits", batch_size = 100, drop_last = false, shift = 1, transforms = [{ name = "mixup", p = 0.3 }] }
teacher = { model = "mlp", size = 2, width = 32 }
student = { model = "mlp", size = 1 }
train = { epochs = 3, clip = 5.0 }
execute = { log_every = 5, checkpoint_seconds = 0.0 }
[[objective]]
loss = "cross_entropy"
[[objective]]
loss = "dkd"
normalize = "class"
weight = 8.0
[[controller]]
name = "dskd"
patience = 1
"""


def start(folder: Path, *sets: str, size: int = 2, prepare=lambda rank: None) -> Command:
    """The run in its folder; the same call goes on with it."""
    (folder / "r.toml").write_text(TEXT)
    arguments = ["run", "r.toml", *(word for text in sets for word in ("--set", text))]
    return command(arguments, folder, size, prepare)


def result(folder: Path) -> dict:
    return json.loads(next(folder.glob("runs/r-*/result.json")).read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of a run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("two")
    done = start(folder)
    assert done.codes() == [0, 0], done.out.read_text()
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    done = start(folder, size=1)
    assert done.codes() == [0], done.out.read_text()
    return folder


# ---------------------------------------------------------------- the same science


def test_two_processes_train_the_weights_of_one(one, two):
    for expected, found in zip(*(by_name(folder) for folder in (one, two)), strict=True):
        assert expected[0] == found[0]
        for name, tensor in load_file(found[1]).items():
            torch.testing.assert_close(tensor, load_file(expected[1])[name], rtol=1e-3, atol=2e-5)


def by_name(folder: Path) -> list[tuple[str, Path]]:
    """Weights of every stage, by stage and member."""
    files = folder.glob("runs/store/results/*/*.safetensors")
    return sorted((json.loads((file.parent / "result.json").read_text())["name"] + file.stem, file) for file in files)


def test_two_processes_decide_what_one_does_on_the_same_numbers(one, two):
    for expected, found in zip(*(result(folder)["stages"] for folder in (one, two)), strict=True):
        assert [event["kind"] for event in expected["events"]] == [event["kind"] for event in found["events"]]
        assert [event["step"] for event in expected["events"]] == [event["step"] for event in found["events"]]
        for name, member in expected["members"].items():
            other = found["members"][name]
            assert [list(row) for row in member["curve"]] == [list(row) for row in other["curve"]]
            for row, own in zip(member["curve"], other["curve"], strict=True):
                assert own == pytest.approx(row, rel=2e-3, abs=1e-3)
            for accuracy in ("monitor_accuracy", "test_accuracy", "monitor_images"):
                assert other[accuracy] == pytest.approx(member[accuracy], abs=0.004)
    assert any(stage["events"] for stage in result(two)["stages"])


def test_what_a_stage_costs_counts_all_processes(one, two):
    for expected, found in zip(*(result(folder)["stages"] for folder in (one, two)), strict=True):
        assert found["flops"] == expected["flops"]
        assert found["steps"] == expected["steps"]


def test_the_number_of_processes_is_recorded_and_part_of_the_key(one, two):
    stages = [result(folder)["stages"] for folder in (one, two)]
    assert not {stage["key"] for stage in stages[0]} & {stage["key"] for stage in stages[1]}
    assert {stage["environment"]["world_size"] for stage in stages[1]} == {2}
    assert json.loads(next(two.glob("runs/r-*/run.json")).read_text())["world_size"] == 2
    assert Settings("").numerics["world_size"] == 1


def test_a_batch_size_that_is_found_is_that_of_all_processes(tmp_path):
    done = start(tmp_path, "data.batch_size=auto", "train.epochs=1")
    assert done.codes() == [0, 0], done.out.read_text()
    assert result(tmp_path)["recipe"]["data"]["batch_size"] == 128
    assert {stage["steps"] for stage in result(tmp_path)["stages"]} == {11}


@pytest.mark.parametrize(
    ("size", "accumulate", "text"),
    [(1, 3, "3 times .* train.accumulate"), (2, 1, "2 times .* 2 ranks"), (2, 3, "6 times .* 2 ranks and train")],
)
def test_batch_normalisation_that_sees_less_than_a_batch_is_warned_of(size, accumulate, text):
    learner = SimpleNamespace(name="student", spec=SimpleNamespace(model="net"), module=torch.nn.BatchNorm1d(3))
    learner.terms = [SimpleNamespace(module=torch.nn.ReLU())]
    stage = SimpleNamespace(data=SimpleNamespace(accumulate=accumulate))
    session = SimpleNamespace(world=World(0, size), stage=stage, learners={"student": learner})
    (told,) = parts.warnings(session)
    assert re.search(text, told)


def test_only_one_process_prints(two):
    text = (two / "out").read_text()
    assert text.count("mlp-2 -> mlp-1: student") == 1
    assert text.count("report.html") == 1


def test_a_plan_of_two_processes_is_printed_once(tmp_path):
    (tmp_path / "r.toml").write_text(TEXT)
    done = command(["plan", "r.toml"], tmp_path)
    assert done.codes() == [0, 0]
    assert done.out.read_text().count("to train: ") == 1


def test_the_same_command_trains_nothing_again(two):
    before = weights(two / "runs")
    done = start(two)
    assert done.codes() == [0, 0]
    assert weights(two / "runs") == before
    assert "epochs" not in done.out.read_text()


# ---------------------------------------------------------------- the end of a rank

EITHER = pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])


def at_step(number: int, rank: int, act, stage: str = "->") -> object:
    """Does something in a rank before a step of the last stage, or another."""

    def prepare(own: int) -> None:
        from kdcore.training import loop

        step = loop._step

        def stop(session) -> None:
            if own == rank and session.step == number and stage in session.stage.name:
                act()
            step(session)

        loop._step = stop

    return prepare


@EITHER
def test_a_rank_that_is_killed_ends_the_others_and_the_same_command_goes_on_to_the_same_bits(tmp_path, two, rank):
    done = start(tmp_path, prepare=at_step(20, rank, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    codes = done.codes()
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 7
    text = done.out.read_text()
    assert (
        text.count(f"kdcore: DeviceError: torchrun: no answer from rank {rank} of 2: it ended. The same command") == 1
    )
    assert list(tmp_path.glob("runs/store/unfinished/*/ckpt-*"))
    assert start(tmp_path).codes() == [0, 0]
    assert weights(tmp_path / "runs") == weights(two / "runs")


@EITHER
def test_a_signal_to_any_rank_stops_all_after_one_checkpoint_and_the_same_command_goes_on(tmp_path, two, rank):
    done = start(tmp_path, prepare=at_step(21, rank, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert done.codes() == [143, 143]
    text = done.out.read_text()
    assert text.count("stopped by SIGTERM") == 1
    steps = sorted(int(path.name[5:]) for path in tmp_path.glob("runs/store/unfinished/*/ckpt-*"))
    assert 22 <= steps[-1] <= 21 + 5  # within the interval of two log lines
    assert start(tmp_path).codes() == [0, 0]
    assert weights(tmp_path / "runs") == weights(two / "runs")


@EITHER
def test_an_error_in_any_rank_ends_all_and_is_told_once(tmp_path, rank):
    def fail() -> None:
        raise api.PluginError("shapes", where="a step")

    done = start(tmp_path, prepare=at_step(3, rank, fail, "labels"))
    assert done.codes() == [3, 3]
    assert done.out.read_text().count("kdcore: PluginError: a step: shapes") == 1


def test_a_value_that_is_not_finite_in_one_rank_ends_all(tmp_path):
    def spoil(own: int) -> None:
        from kdcore.training.step import StepContext

        record = StepContext.record
        StepContext.record = lambda ctx, name, value: record(ctx, name, value * (float("nan") if own else 1.0))

    done = start(tmp_path, prepare=spoil)
    assert done.codes() == [6, 6]
    assert done.out.read_text().count("kdcore: NumericError") == 1


# ---------------------------------------------------------------- parts


@given(total=st.integers(0, 300), size=st.integers(1, 9))
def test_parts_are_in_order_whole_and_even(total, size):
    spans = [World(rank, size).span(total) for rank in range(size)]
    assert [i for span in spans for i in range(total)[span]] == list(range(total))
    lengths = [span.stop - span.start for span in spans]
    assert max(lengths) - min(lengths) <= 1


def test_a_batch_with_too_few_samples_for_the_ranks_is_refused():
    index = torch.arange(2)
    batch = api.Batch(torch.zeros(2, 1, 4, 4), None, index, 0)
    assert World(1, 2).part(batch).index.tolist() == [1]
    with pytest.raises(DataError, match="a batch of 2 samples has none for each of 3 ranks"):
        World(0, 3).part(batch)


# ---------------------------------------------------------------- what is refused


def test_the_way_in_from_python_refuses_to_be_called_in_several_processes(tmp_path, monkeypatch):
    for name, value in environment(0, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"called in 2 processes of torchrun\. Write a recipe"):
        api.run(RECIPE, root=tmp_path, quiet=True)


def test_what_two_processes_began_is_not_resumed_by_one(two, cli):
    folder = next(two.glob("runs/r-*"))
    done = cli("resume", folder)
    assert done.code == 2
    assert "it was trained by 2 processes, not 1" in done.err
    assert f"torchrun --nproc-per-node 2 -m kdcore resume {folder}" in done.err


@pytest.mark.parametrize(
    ("sets", "code", "text"),
    [
        (
            ["objective.1={loss='rkd'}"],
            2,
            "the samples of a batch are compared (loss 'rkd' of student), and each of 2 ranks has a part. Train it in",
        ),
        pytest.param(
            ["data.batch_size=1294", "objective=[{loss='cross_entropy'}]"],
            5,
            "a batch of 1 samples is too small for 2 ranks",
            marks=pytest.mark.long,
        ),
        (["execute.jobs=2"], 2, "2 stages at once, and every stage in all ranks"),
    ],
    ids=["relations", "ragged", "jobs"],
)
def test_what_would_mean_something_else_is_refused(tmp_path, sets, code, text):
    done = start(tmp_path, *sets)
    assert set(done.codes()) == {code}
    assert done.out.read_text().count(text) == 1


def test_a_loss_that_keeps_what_its_rank_saw_is_found_after_one_step(tmp_path):
    def keep(own: int) -> None:
        from kdcore.losses.terms import CrossEntropy

        forward = CrossEntropy.forward

        def seen(self, student, teacher, batch):
            self.register_buffer("seen", student.logits.detach().mean())
            return forward(self, student, teacher, batch)

        CrossEntropy.forward = seen

    done = start(tmp_path, prepare=keep)
    assert done.codes() == [7, 7]
    said = (
        "'mlp-2 on labels', step 1: teacher/term.cross_entropy/seen of rank 1 is not rank 0's. Train it in one process"
    )
    assert done.out.read_text().count(said) == 1
