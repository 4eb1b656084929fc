"""A stage that runs out of memory: it ends, or goes on in pieces where that means the same."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kdcore_features.fitnet import FitNet
from kdcore_features.options import FitNetOptions, ReviewKDOptions
from kdcore_features.reviewkd import ReviewKD
from safetensors.torch import load_file
from small import RECIPE, make_run, weights

import kdcore
from kdcore.errors import DeviceError, Interrupted, PluginError, PreflightError, RecipeError
from kdcore.plugins import load_plugins
from kdcore.training import loop, memory
from kdcore.training.step import StepContext
from kdcore.training.world import World

PLUGIN = Path(__file__).with_name("tight_plugin.py")
TIGHT = {**RECIPE, "student": {"model": "tight"}}
RETRY = "execute.failure=retry"


@pytest.fixture(scope="module")
def host():
    return load_plugins(files=[PLUGIN])


@pytest.fixture
def tight(monkeypatch, host):
    """Sets the largest batches; gives the plugin's module, its records empty."""
    module = sys.modules["tight_plugin"]
    for record in (module.FAILED, module.ALIVE, module.Told.failures):
        record.clear()

    def limit(train=100000, evaluation=100000):
        monkeypatch.setenv("KDCORE_TIGHT", f"{train},{evaluation}")
        return module

    return limit


@pytest.fixture(scope="module")
def whole(tmp_path_factory, host):
    """The run with memory enough."""
    made = make_run(tmp_path_factory.mktemp("whole"), recipe=TIGHT, host=host)
    return made, made.execute()["stages"][-1]


def run(root, host, *sets, **arguments):
    made = make_run(root, host=host, sets=sets, **{"recipe": TIGHT, **arguments})
    return made, made.execute()["stages"][-1]


# ---------------------------------------------------------------- without a policy


def test_out_of_memory_ends_the_run_and_says_what_to_do(tmp_path, host, tight):
    tight(train=40)
    with pytest.raises(DeviceError) as error:
        run(tmp_path, host)
    said = "stage 'mlp-2 -> tight': out of memory on cpu: tried to allocate for 128 images. Lower data.batch_size."
    assert str(error.value) == said
    assert error.value.exit_code == 7


def test_the_hosts_own_words_for_it_are_understood(tmp_path, host, tight, monkeypatch):
    tight(train=40)
    monkeypatch.setenv("KDCORE_TIGHT_CPU", "1")
    with pytest.raises(DeviceError, match=r"out of memory on cpu: .*can't allocate memory"):
        run(tmp_path, host)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_libraries_that_allocate_for_themselves_are_understood(said):
    assert memory.is_exhausted(RuntimeError(said))


def test_pythons_own_lack_of_memory_is_understood(tmp_path, host, monkeypatch):
    def fail(session):
        raise MemoryError("unable to allocate 8 GiB")  # as numpy says it

    monkeypatch.setattr("kdcore.training.loop._step", fail)
    with pytest.raises(DeviceError, match="out of memory on cpu: unable to allocate 8 GiB"):
        run(tmp_path, host)


def test_another_runtime_error_is_no_lack_of_memory(tmp_path, host, monkeypatch):
    def fail(session):
        raise RuntimeError("shapes")

    monkeypatch.setattr("kdcore.training.loop._step", fail)
    with pytest.raises(RuntimeError, match=r"^shapes$"):
        run(tmp_path, host, RETRY)


def test_an_unknown_policy_is_refused_by_name(tmp_path, host):
    with pytest.raises(RecipeError, match=r"execute.failure.name: unknown failure policy 'rety'. Did you mean 'retry'"):
        make_run(tmp_path, host=host, sets=["execute.failure=rety"])


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("sets", [(), ("train.clip=0.1", "data.batch_size=100")])
def test_pieces_give_the_whole_batchs_weights_and_curves_to_the_last_digits(tmp_path, host, tight, whole, sets):
    _, expected = whole if not sets else run(tmp_path / "whole", host, *sets)
    module = tight(train=30)
    made, stage = run(tmp_path, host, RETRY, *sets)
    first = (whole[0] if not sets else make_run(tmp_path / "whole", host=host)).folder
    for name, tensor in load_file(made.folder / "student.safetensors").items():
        torch.testing.assert_close(tensor, load_file(first / "student.safetensors")[name], rtol=1e-4, atol=1e-6)
    rows, wanted = (s["members"]["student"]["curve"] for s in (stage, expected))
    assert [list(row) for row in rows] == [list(row) for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    assert stage["flops"] == expected["flops"]
    assert ([100, 50] if sets else [128, 64, 32]) == module.FAILED


def test_pieces_are_an_event_and_a_warning_with_the_steps_that_they_concern(tmp_path, host, tight):
    tight(train=40)
    made, stage = run(tmp_path, host, RETRY)
    event = stage["events"][-1]
    assert (event["kind"], event["step"], event["value"], event["controller"]) == ("pieces", 0, 4, "retry")
    assert event["reason"] == "out of memory at step 0: from step 0 on, batches are in 4 pieces"
    assert event["reason"] in [warning["text"] for warning in made.console.kinds("warning")]
    assert "batches in 4 pieces" in (made.folder / "report.html").read_text()
    assert not stage["warnings"]


def test_a_recipe_with_memory_enough_has_the_same_bits_with_and_without_the_policy(tmp_path, host, whole):
    _, stage = run(tmp_path, host, RETRY)
    assert weights(tmp_path) == weights(whole[0].folder.parent)
    assert stage["key"] == whole[1]["key"]


def test_what_a_try_held_is_gone_before_the_next_one(tmp_path, host, tight):
    module = tight(train=20)
    module.MODELS.clear()
    gc.disable()  # chance must not do it
    try:
        run(tmp_path, host, RETRY, "train.epochs=1")
    finally:
        gc.enable()
    assert len(module.ALIVE) == 3
    assert set(module.ALIVE) == {1}


def test_what_a_stage_held_is_gone_before_the_next_one(tmp_path, host, monkeypatch):
    opened, alive = [], []

    def open_session(*given):
        alive.append([session for session in opened if session() is not None])
        session = loop.open_session_of(*given)
        opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(loop, "open_session_of", loop.open_session, raising=False)
    monkeypatch.setattr(loop, "open_session", open_session)
    gc.disable()  # chance must not do it
    try:
        make_run(tmp_path, recipe=RECIPE, host=host, sets=["cache.views=1", "train.epochs=1"]).execute()
    finally:
        gc.enable()
    assert alive == [[], []]


def test_a_run_killed_in_pieces_goes_on_with_the_same_bits_and_without_failing_again(tmp_path, host, tight):
    module = tight(train=40)
    sets = (RETRY, "execute.checkpoint_seconds=0", "train.epochs=4")
    run(tmp_path / "a", host, *sets)
    failed = list(module.FAILED)
    killed = make_run(tmp_path / "b", recipe=TIGHT, host=host, sets=sets)
    killed.context.stopped = lambda: 15 if len(killed.console.kinds("tick")) >= 4 + 2 else 0
    with pytest.raises(Interrupted):
        killed.execute()
    assert 2 * failed == module.FAILED
    run(tmp_path / "b", host, *sets)
    assert 2 * failed == module.FAILED
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_late_failure_goes_on_from_the_checkpoint(tmp_path, host, tight, monkeypatch):
    module = tight()
    made = make_run(tmp_path, recipe=TIGHT, host=host, sets=[RETRY, "execute.checkpoint_seconds=0", "train.epochs=4"])
    handle = made.console.handle

    def shrink(event):
        handle(event)
        if event["kind"] == "checkpoint" and "->" in event["name"]:
            tight(train=40)

    monkeypatch.setattr(made.console, "handle", shrink)
    event = made.execute()["stages"][-1]["events"][-1]
    steps = made.console.kinds("checkpoint")[-1]["step"] // 3
    assert (event["step"], event["epoch"], event["value"]) == (steps, 1, 4)
    assert module.FAILED == [128, 64]


def test_evaluation_that_runs_out_of_memory_is_cut_too(tmp_path, host, tight, whole):
    module = tight(evaluation=100)
    _, stage = run(tmp_path, host, RETRY)
    assert module.FAILED == [143, 143, 128]  # 512, 256 and 128 at most, of 143 images
    for accuracy in ("monitor_accuracy", "test_accuracy"):
        found, expected = (s["members"]["student"][accuracy] for s in (stage, whole[1]))
        assert found == pytest.approx(expected, abs=0.008)  # one image more or less


@pytest.mark.long
def test_worker_processes_have_the_policy_too(tmp_path, host, tight):
    tight(train=40)
    _, alone = run(tmp_path / "alone", host, RETRY)
    _, stage = run(tmp_path / "two", host, RETRY, jobs=2)
    assert weights(tmp_path / "two") == weights(tmp_path / "alone")
    assert stage["events"] == alone["events"]


@given(
    samples=st.integers(1, 300),
    batch_size=st.integers(2, 300),
    pieces=st.integers(2, 300),
    normal=st.booleans(),
    ranks=st.integers(1, 4),
)
def test_a_batch_is_cut_in_order_into_even_pieces_of_the_promised_size(samples, batch_size, pieces, normal, ranks):
    samples = max(samples, ranks)
    module = torch.nn.BatchNorm1d(2) if normal else torch.nn.Identity()
    learner = SimpleNamespace(terms=[SimpleNamespace(module=torch.nn.Identity())], module=module)
    stage = SimpleNamespace(data=SimpleNamespace(batch_size=batch_size))
    index = torch.arange(samples)
    batch = kdcore.Batch(index[:, None].float(), index, index, 0.0)
    counts = set()
    for rank in range(ranks):
        session = SimpleNamespace(
            pieces=min(pieces, batch_size), stage=stage, learners={"student": learner}, world=World(rank, ranks)
        )
        own = session.world.part(batch)
        session.meet = lambda whole: None
        context = StepContext(session)
        context.begin(0, len(own.inputs), samples)
        parts, passes = [], 0
        for piece in context.pieces(own):
            parts.append(piece)
            passes += context._of_all_ranks(len(piece.inputs))
        assert passes == samples, "every image counts once"
        sizes = [len(part.inputs) for part in parts]
        counts.add(len(sizes))
        assert torch.equal(torch.cat([part.index for part in parts]), own.index)
        assert all(torch.equal(part.inputs[:, 0], part.target.float()) for part in parts)
        assert max(sizes) - min(sizes) <= 1
        if normal:
            assert min(sizes) >= min(2, len(own.inputs))
        else:
            assert max(sizes) <= max(-(-batch_size // session.pieces), 2 if ranks > 1 else 1)
    assert len(counts) == 1, "ranks are in step"


# ---------------------------------------------------------------- where pieces would mean something else


def test_class_statistics_are_of_the_whole_batch_in_pieces_too(tmp_path, host, tight):
    sets = (RETRY, "objective.1.normalize=class")
    made, _ = run(tmp_path / "whole", host, *sets)
    expected = load_file(made.folder / "student.safetensors")
    tight(train=40)
    made, stage = run(tmp_path / "pieces", host, *sets)
    assert stage["events"][-1]["value"] == 4
    for name, tensor in load_file(made.folder / "student.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_class_statistics_that_come_later_are_of_the_whole_batch_then(tmp_path, host, tight):
    recipe = {**TIGHT, "controller": [{"name": "normalise"}]}
    made, _ = run(tmp_path / "whole", host, RETRY, recipe=recipe)
    expected = load_file(made.folder / "student.safetensors")
    tight(train=40)
    made, _ = run(tmp_path / "pieces", host, RETRY, recipe=recipe)
    for name, tensor in load_file(made.folder / "student.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("loss", "options"), [(FitNet, FitNetOptions()), (ReviewKD, ReviewKDOptions())])
def test_batch_normalisation_in_a_losss_adapter_is_cut_into_pairs_at_most_as_in_a_model(loss, options):
    """Public methods of feature distillation have it; they were refused for class statistics, which they lack."""
    taps = {"stage1": (2, 4, 4), "stage2": (3, 2, 2)}
    shapes = kdcore.Shapes(3, 8, taps, taps, adapter=lambda own, other: torch.nn.Identity())
    term = SimpleNamespace(module=loss.build(shapes, options), label="it")
    learner = SimpleNamespace(name="student", terms=[term], module=torch.nn.Identity(), live=lambda: [term])
    stage = SimpleNamespace(data=SimpleNamespace(batch_size=7), step=SimpleNamespace(name="distill"))
    session = SimpleNamespace(
        pieces=7, stage=stage, learners={"student": learner}, step_kind=SimpleNamespace(splits=True), world=World()
    )
    memory.check(session)
    index = torch.arange(7)
    parts = memory.cut(session, kdcore.Batch(index[:, None].float(), index, index, 0.0))
    assert [len(part.inputs) for part in parts] == [3, 2, 2]


def test_a_loss_that_compares_samples_by_more_than_logits_refuses_pieces(tmp_path, host, tight, monkeypatch):
    monkeypatch.setattr("kdcore.losses.terms.KD.mean_over_batch", False, raising=False)
    monkeypatch.setattr("kdcore.losses.terms.KD.needs", frozenset({"logits", "index"}), raising=False)
    tight(train=40)
    said = r"out of memory on cpu, and the samples of a batch are compared \(loss 'kd' of student\). Lower data.batch_s"
    with pytest.raises(DeviceError, match=said):
        run(tmp_path, host, RETRY)


def test_single_samples_are_the_end(tmp_path, host, tight):
    module = tight(train=0)
    with pytest.raises(DeviceError, match=r"out of memory on cpu with batches in 64 pieces: .* Take smaller models"):
        run(tmp_path, host, RETRY, "data.batch_size=64", "train.epochs=1")
    assert module.FAILED[1:] == [64, 32, 16, 8, 4, 2, 1]  # after the rehearsal, which minds no memory


def test_a_step_that_takes_no_pieces_refuses_them(tmp_path, host, tight):
    tight(train=40)
    with pytest.raises(DeviceError, match=r"and step 'whole' takes no pieces. Lower data.batch_size"):
        run(tmp_path, host, RETRY, recipe={**TIGHT, "strategy": "whole"})


def test_batch_normalisation_is_cut_into_pairs_at_most_and_warned_of(tmp_path, host, tight):
    module = tight(train=3)
    recipe = {**TIGHT, "student": {"model": "tight-norm"}, "data": {**RECIPE["data"], "batch_size": 7}}
    _, stage = run(tmp_path, host, RETRY, "train.epochs=1", recipe=recipe)
    text = (
        "student tight-norm normalises by batches, which are 3 times smaller than data.batch_size says: memory ran out"
    )
    assert stage["warnings"] == [text]
    assert module.FAILED[1:] == [7, 4]  # after the rehearsal


def test_strict_takes_no_smaller_batches_for_batch_normalisation(tmp_path, host, tight):
    tight(train=40)
    with pytest.raises(PreflightError, match="normalises by batches"):
        run(tmp_path, host, RETRY, recipe={**TIGHT, "student": {"model": "tight-norm"}}, strict=True)


# ---------------------------------------------------------------- policies of others


def test_a_policy_is_told_what_happened_and_decides(tmp_path, host, tight):
    module = tight(train=40)
    _, stage = run(tmp_path, host, "execute.failure={name='told', pieces=16}")
    (failure,) = module.Told.failures
    assert failure == kdcore.Failure("mlp-2 -> tight", 0, 128, 1, 128, "tried to allocate for 128 images")
    assert stage["events"][-1]["value"] == 16
    assert stage["events"][-1]["controller"] == "told"


@pytest.mark.parametrize("policy", ["odd", "{name='told', pieces=1}", "{name='told', pieces=129}"])
def test_a_policy_that_answers_nonsense_is_blamed(tmp_path, host, tight, policy):
    tight(train=40)
    said = r"failure policy 'tight_plugin/\w+': decide\(\) gave .* kdcore.Retry with 2 to 128 pieces"
    with pytest.raises(PluginError, match=said):
        run(tmp_path, host, f"execute.failure={policy}")
