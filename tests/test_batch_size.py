"""data.batch_size = "auto": a number that is found once, and kept."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from ranks import environment
from small import RECIPE, make_run, weights
from torch.optim.optimizer import register_optimizer_step_post_hook

from kdcore import autosize
from kdcore.cli.drive import folder_of
from kdcore.errors import DeviceError, RecipeError, StorageError
from kdcore.journal import Journal
from kdcore.plugins import load_plugins
from kdcore.recipe import load
from kdcore.training import cache, device, trial
from kdcore.training.scaling import Scaler
from kdcore.training.session import Session, open_session

PLUGIN = Path(__file__).with_name("tight_plugin.py")
AUTO = ["data.batch_size=auto", "train.epochs=1"]


@pytest.fixture(scope="module")
def host():
    return load_plugins(files=[PLUGIN])


@pytest.fixture(scope="module", autouse=True)
def frozen(host):
    """Each trial ends with a collection, which need not look at all that torch and pytest hold."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tight(monkeypatch):
    """A device on which the student trains with so many samples at most."""

    def limit(samples):
        sys.modules["tight_plugin"].FAILED.clear()
        monkeypatch.setenv("KDCORE_TIGHT", f"{samples},100000")

    return limit


def found(tmp_path, host, most=4096, sets=(), **recipe):
    made = make_run(tmp_path, recipe={**RECIPE, "student": {"model": "tight"}, **recipe}, host=host, sets=sets)
    return autosize.largest(made.view, host.catalog, made.settings, made.context.load, most)


@pytest.fixture
def free(monkeypatch):
    """Says what memory is free on the device, where tensors take what is asked for."""

    def say(free, taken=0):
        monkeypatch.setattr(device, "free_memory", lambda place: free)
        monkeypatch.setattr(device, "watched_memory", lambda place: lambda: taken)

    return say


@pytest.fixture
def ranks(monkeypatch):
    """This process is the first of some; nobody else is there to be talked to."""

    def start(size):
        for name, value in environment(0, size).items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(("samples", "size"), [(64, 64), pytest.param(3, 2, marks=pytest.mark.long)])
def test_the_largest_power_of_two_at_which_both_stages_train_is_taken(tmp_path, host, tight, samples, size):
    tight(samples)
    assert found(tmp_path, host) == size
    assert min(sys.modules["tight_plugin"].FAILED) == 2 * size
    assert set(sys.modules["tight_plugin"].ALIVE) == {1}  # nothing of the sizes before


@pytest.mark.long
def test_the_bound_is_taken_where_more_would_fit(tmp_path, host, tight):
    tight(100)
    assert found(tmp_path, host, most=40) == 32


def test_pieces_make_room_for_larger_batches(tmp_path, host, tight):
    tight(20)
    assert found(tmp_path, host, sets=["train.accumulate=8"], most=256) == 128


def test_more_pieces_than_the_split_wants_samples_are_a_batch_of_as_many(tmp_path, host):
    assert found(tmp_path, host, sets=["data.batch_size=100", "train.accumulate=100"], most=40) == 128


@pytest.mark.parametrize(("size", "accumulate", "batch"), [(3, 1, 48), (2, 8, 256)])
def test_each_rank_trains_its_part_and_asks_no_other(tmp_path, host, tight, ranks, size, accumulate, batch):
    tight(16)
    ranks(size)
    assert found(tmp_path, host, sets=[f"train.accumulate={accumulate}"], most=1024) == batch
    assert min(sys.modules["tight_plugin"].FAILED) == 32


def test_a_tenth_of_the_free_memory_stays_free(tmp_path, host, free):
    free(1000, taken=900)
    assert found(tmp_path, host, most=4) == 4
    free(1000, taken=901)
    with pytest.raises(DeviceError, match="not even 2 samples"):
        found(tmp_path, host, most=4)


def test_an_evaluation_batch_must_fit_too(tmp_path, host, monkeypatch):
    monkeypatch.setenv("KDCORE_TIGHT", "100000,100")
    with pytest.raises(DeviceError, match="not even 2 samples"):
        found(tmp_path, host, most=4)
    monkeypatch.setenv("KDCORE_TIGHT", "100000,512")
    assert found(tmp_path, host, most=4) == 4


def test_the_message_of_gradients_to_other_ranks_is_counted(tmp_path, host, free, ranks):
    teacher = 4 * (64 * 32 + 32 + 32 * 10 + 10)  # bytes of the larger member's parameters
    free(math.ceil(teacher / 0.9) - 2)
    assert found(tmp_path, host, most=4) == 4
    ranks(2)
    with pytest.raises(DeviceError, match="not even 2 samples"):
        found(tmp_path, host, most=4)
    free(math.ceil(teacher / 0.9) + 1)
    assert found(tmp_path, host, most=4) == 4


def test_what_a_cache_has_on_the_device_is_counted(tmp_path, host, free, monkeypatch):
    views = {"cache": {"views": 4}, "train": {"epochs": 4}}
    free(80_000 + 4 * 1295 * 10 * 2, taken=72_000)  # float16 logits of 10 classes
    with pytest.raises(DeviceError, match="not even 2 samples"):
        found(tmp_path, host, most=2, **views)
    assert found(tmp_path, host, most=2) == 2
    free(80_000 + 4 * 1295 * 10 * 2 * 10 // 9 + 1, taken=72_000)
    assert found(tmp_path, host, most=2, **views) == 2
    free(80_000, taken=72_000)
    monkeypatch.setattr(cache, "RESIDENT", 100_000)  # it stays on the host
    assert found(tmp_path, host, most=2, **views) == 2
    assert not list(tmp_path.glob("store/caches/*"))


@pytest.mark.parametrize(("times", "updates"), [(6, 2), (1000, 0)])
def test_gradients_that_overflow_float16_are_no_lack_of_memory(tmp_path, host, monkeypatch, times, updates):
    """They do at first, until the scale is small enough; the optimizer has no state before."""
    calls, states = Counter(), []

    def scale(self, loss):
        calls[self] += 1
        return self.amp.scale(loss) * (math.inf if calls[self] <= times else 1)

    monkeypatch.setattr(Scaler, "scale", scale)
    with register_optimizer_step_post_hook(lambda optimizer, *_: states.append(len(optimizer.state))):
        assert found(tmp_path, host, most=2, precision="float16") == 2
    assert len(states) == 2 * updates  # of the teacher's stage and the student's
    assert all(states)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_trial_closes_what_it_opens(tmp_path, host, tight, monkeypatch, samples):
    opened, closed = [], []
    monkeypatch.setattr(trial, "open_session", lambda *given: opened.append(given) or open_session(*given))
    monkeypatch.setattr(Session, "close", lambda self: closed.append(self))
    tight(samples)
    with pytest.raises(DeviceError) if samples == 1 else nullcontext():
        found(tmp_path, host, most=4)
    assert len(closed) == len(opened) > 1


def test_a_model_that_never_fits_is_an_error(tmp_path, host, tight):
    tight(1)
    with pytest.raises(DeviceError, match=r"^data.batch_size: not even 2 samples fit on cpu. Take smaller models"):
        found(tmp_path, host, most=4)


@pytest.mark.parametrize(("samples", "size"), [(1795, 128), (30000, 256), (20, 2)])
def test_a_cpu_takes_256_or_what_leaves_an_epoch_8_steps(tmp_path, host, samples, size):
    data = {"name": "synthetic", "samples": samples, "size": 4, "channels": 1, "test_samples": 20}
    made = make_run(tmp_path, recipe={**RECIPE, "data": data}, host=host, sets=AUTO)
    assert made.view.data.batch_size == size


def test_the_number_is_shown_recorded_and_in_the_keys(tmp_path, host):
    auto = make_run(tmp_path, host=host, sets=[*AUTO, "train.lr_batch=32"])
    result = auto.execute()
    assert [event["text"] for event in auto.console.kinds("note")] == ["batches of 128 samples"]
    assert json.loads((auto.folder / "run.json").read_text())["recipe"]["data"]["batch_size"] == 128
    assert result["recipe"]["data"]["batch_size"] == 128
    assert auto.view.optimizer.lr.value == 4 * 0.05
    number = make_run(tmp_path, host=host, sets=["data.batch_size=128", "train.epochs=1", "train.lr=0.2"], name="other")
    assert number.execute()["student"]["stage"] == result["student"]["stage"]


def test_a_rate_that_was_meant_for_another_size_is_told(tmp_path, host, monkeypatch):
    monkeypatch.setattr(autosize, "ON_CPU", 64)
    made = make_run(tmp_path, host=host, sets=[*AUTO, "train.teacher.epochs=1"])
    made.execute()
    said = "batches of 64 samples; train.lr is taken as it is: train.lr_batch would scale it"
    assert [event["text"] for event in made.console.kinds("note")] == [said]


def test_going_on_takes_the_number_of_the_beginning(tmp_path, host, monkeypatch):
    make_run(tmp_path, host=host, sets=AUTO).execute()
    before = weights(tmp_path)
    monkeypatch.setattr(autosize, "ON_CPU", 16)  # as on another machine
    again = make_run(tmp_path, host=host, sets=AUTO)
    assert again.view.data.batch_size == 128
    assert all(stage["reused"] for stage in again.execute()["stages"])
    assert weights(tmp_path) == before
    assert make_run(tmp_path, host=host, sets=AUTO, name="other").view.data.batch_size == 16
    assert len(list(again.journal.of("batch_size"))) == 1


def test_a_journal_without_a_number_is_refused(tmp_path, host):
    Journal(tmp_path / "run" / "journal.jsonl").append({"kind": "batch_size", "value": "many"})
    with pytest.raises(StorageError, match="batch_size is 'many'"):
        make_run(tmp_path, host=host, sets=AUTO)


@pytest.mark.parametrize("value", ["most", "0", "true"])
def test_what_is_neither_a_number_nor_auto_is_refused(tmp_path, host, value):
    with pytest.raises(RecipeError, match=r"^data.batch_size: .*a number of samples from 1, or \"auto\""):
        make_run(tmp_path, host=host, sets=[f"data.batch_size={value}"])


def test_a_plan_for_a_gpu_trains_nothing_and_says_what_is_open(cli, tiny, tmp_path, monkeypatch):
    recipe, sets = tiny(), ["--set", "data.batch_size=auto", "--set", "train.lr_batch=64", "--set", "device=cuda"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # no trial could run on it
    done = cli("plan", recipe, *sets)
    assert "batches of 128, learning rate 0.1 (at most: settled when the run begins)" in done.out
    assert done.out.count("?") == 2
    folder = folder_of(load(recipe, sets[1::2]), "tiny", tmp_path / "runs")
    Journal(folder / "journal.jsonl").append({"kind": "batch_size", "value": 64})
    settled = cli("plan", recipe, *sets)
    assert "batches of 64, learning rate 0.05\n" in settled.out
    assert "?" not in settled.out
