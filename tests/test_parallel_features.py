"""Data parallel runs with caches, pieces, compiled members, float16 and members that are dropped."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import Command, command
from safetensors.torch import load_file
from small import weights
from test_cache import IMAGES

import kdcore as api
from kdcore.store import Store

RAGGED = """
seed = 0
threads = 1
device = "cpu"
data = { name = "digits", batch_size = 101, drop_last = false, shift = 1 }
teacher = { model = "mlp", size = 2, width = 32 }
student = { model = "mlp", size = 1 }
train = { epochs = 2, teacher = { epochs = 1 } }
execute = { log_every = 5 }
[[objective]]
loss = "cross_entropy"
[[objective]]
loss = "kd"
"""
CLASS = "objective.1.normalize='class'"
BRITTLE = """
import kdcore
import torch

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("brittle", Brittle)

class Brittle(torch.nn.Module):
    '''Without value, and steep where one sample is in the batch: at 1e39, inf in float32, it is not a number.'''
    needs = frozenset({"logits"})

    class Options(kdcore.Options):
        slope: float = 0.0

    @classmethod
    def build(cls, shapes, options):
        made = cls()
        made.slope = options.slope
        return made

    def forward(self, student, teacher, batch):
        x = student.logits.float().sum()
        return (x - x.detach()) * (self.slope if 700 in batch.index else 0.0)
"""
POINT = "{name='v', grid={'brittle.slope'=[0.0, 3e38, 1e39]}, objective=[{loss='kd'}, {loss='brittle'}]}"
DROP = f"strategy={{name='variants', diverged='drop', grid_epochs=1, variant=[{POINT}]}}"
EVERY_STEP = ["execute.log_every=1", "execute.checkpoint_seconds=1e-4"]
CACHE = ["cache={views=3}", "train.epochs=3"]
PIECES = ["train.accumulate=11"]


def start(folder: Path, *sets: str, size: int = 2, prepare=lambda rank: None) -> Command:
    """The run in its folder; the same call goes on with it."""
    folder.mkdir(exist_ok=True)
    (folder / "r.toml").write_text(RAGGED)
    (folder / "brittle.py").write_text(BRITTLE)
    words = [word for text in sets for word in ("--set", text)]
    return command(["run", "r.toml", "--plugin-file", "brittle.py", *words], folder, size, prepare)


def result(folder: Path) -> dict:
    return json.loads(next(folder.glob("runs/r-*/result.json")).read_text())


def learned(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Weights that a stage trained, by stage and member."""
    files = folder.glob("runs/store/results/*/*.safetensors")
    named = [(json.loads((file.parent / "result.json").read_text())["name"] + file.stem, file) for file in files]
    return [load_file(file) for _, file in sorted(named)]


# ---------------------------------------------------------------- the same science


@pytest.mark.parametrize(
    ("sets", "rtol", "atol"),
    [
        pytest.param([*CACHE, *PIECES], 1e-3, 2e-5, id="cache-accumulate"),
        pytest.param([*PIECES, CLASS], 1e-3, 2e-5, id="accumulate-class"),
        pytest.param(["compile=true", CLASS], 1e-3, 1e-4, id="compile", marks=pytest.mark.long),
        pytest.param(["precision='float16'", CLASS], 0.02, 0.005, id="float16"),
        pytest.param([DROP, *EVERY_STEP], 1e-3, 2e-5, id="drop"),
    ],
)
def test_two_processes_with_odd_batches_train_what_one_does(tmp_path, sets, rtol, atol):
    """Of 101 samples and 83 at last, so that parts and pieces are of several sizes."""
    both = [start(tmp_path / str(size), *sets, size=size, prepare=noting_shapes) for size in (1, 2)]
    for done, size in zip(both, (1, 2), strict=True):
        assert done.codes() == [0] * size, done.out.read_text()
    one, two = (learned(tmp_path / str(size)) for size in (1, 2))
    for expected, found in zip(one, two, strict=True):
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol)
    flops = [[stage["flops"] for stage in result(tmp_path / size)["stages"]] for size in "12"]
    assert flops[0] == flops[1], "every image counts once"
    lost, found = ([text.split(",")[0] for text in result(tmp_path / size)["warnings"]] for size in "12")
    assert lost == found
    assert len(lost) == 2 * (sets[0] == DROP)
    if sets[0] == "compile=true":
        assert [(tmp_path / "2" / f"compiled-{rank}").read_text() for rank in (0, 1)] == ["51", "50"]


def noting_shapes(rank: int) -> None:
    """Notes for what batches of a trained member compiled code runs, in a file of the rank."""
    from kdcore.training import session

    compile_member = session.compile_member

    def compiled(learner):
        call = compile_member(learner)

        def run(inputs):
            if learner.module.training:
                Path(f"compiled-{rank}").write_text(str(len(inputs)))
            return call(inputs)

        return run

    session.compile_member = compiled


# ---------------------------------------------------------------- a cache is filled together

EITHER = pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
STORED = "runs/store/caches/*/view-*"


def at_batch(number: int, rank: int, act, pause: float = 0.0):
    """Small batches; does something in a rank before it computes one of them. All note the parts that they store."""

    def prepare(own: int) -> None:
        from kdcore.training import cache, session

        session.EVAL_SIZE = 100
        live, save, count = cache._live, Store.save_part, 0

        def counted(*arguments):
            nonlocal count
            count += 1
            time.sleep(pause)
            Path(f"batches-{own}").write_text(str(count))
            if (own, count) == (rank, number):
                act()
            return live(*arguments)

        def saved(self, key, name, files):
            with Path(f"parts-{own}").open("a") as file:
                print(name, file=file)
            return save(self, key, name, files)

        cache._live, Store.save_part = counted, saved

    return prepare


def made_by(folder: Path, rank: int) -> list[str]:
    file = folder / f"parts-{rank}"
    return [name[:6] for name in file.read_text().split()] if file.exists() else []


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """The folder of a run of two processes with a cache, which nobody disturbs."""
    folder = tmp_path_factory.mktemp("filled")
    done = start(folder, *CACHE, prepare=at_batch(0, 0, lambda: None))
    assert done.codes() == [0, 0], done.out.read_text()
    return folder


def test_each_process_computes_its_share_of_the_parts_and_all_passes_count(filled):
    assert [made_by(filled, rank) for rank in (0, 1)] == [["view-0", "view-2"], ["view-1"]]
    stage = result(filled)["stages"][-1]
    assert stage["flops"]["teacher"] == 3 * IMAGES * stage["members"]["teacher"]["flops"]


@EITHER
def test_a_signal_to_any_process_ends_filling_within_a_part_and_finished_parts_stay(tmp_path, filled, rank):
    done = start(tmp_path, *CACHE, prepare=at_batch(5 if rank else 16, rank, lambda: os.kill(os.getpid(), 15), 0.01))
    assert done.codes() == [143, 143], done.out.read_text()
    assert done.out.read_text().count("stopped by SIGTERM") == 1
    counts = [int((tmp_path / f"batches-{own}").read_text()) for own in (0, 1)]
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob(STORED)}
    assert counts == ([5, 5] if rank else [16, 14])  # 13 make a part; each rank looks first how large a row is
    assert len(there) == (0 if rank else 2)
    assert start(tmp_path, *CACHE, prepare=at_batch(0, 0, lambda: None)).codes() == [0, 0]
    assert there.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob(STORED)}.items()
    assert weights(tmp_path / "runs") == weights(filled / "runs")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_while_it_fills_ends_all(tmp_path, rank):
    done = start(tmp_path, *CACHE, prepare=at_batch(16 - 3 * rank, rank, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert sorted(done.codes()) == [-signal.SIGKILL, 7]
    assert done.out.read_text().count(f"no answer from rank {rank} of 2: it ended") == 1


@EITHER
def test_an_error_of_a_process_that_fills_ends_all_and_is_told_once(tmp_path, rank):
    def fail() -> None:
        raise api.StorageError("no room", where="a part")

    done = start(tmp_path, *CACHE, prepare=at_batch(5, rank, fail))
    assert done.codes() == [4, 4]
    assert done.out.read_text().count("kdcore: StorageError: a part: no room") == 1


def test_a_signal_ends_all_while_another_run_fills_the_same_cache(tmp_path, filled):
    (key,) = (path.name for path in filled.glob("runs/store/caches/*"))

    def prepare(own: int) -> None:
        from kdcore.training import cache

        ask, asked = cache._any_busy, 0

        def counted(session, busy):
            nonlocal asked
            asked += 1
            if (own, asked) == (1, 3):
                os.kill(os.getpid(), signal.SIGTERM)
            return ask(session, busy)

        cache._any_busy = counted
        at_batch(0, 0, lambda: None)(own)

    with Store(tmp_path / "runs" / "store").lease(key, lambda holder: None):
        assert start(tmp_path, *CACHE, prepare=prepare).codes() == [143, 143]
    assert not list(tmp_path.glob(STORED))
