"""What holds on the CPU holds on a GPU: the ops, the same bits, and training; `make test` leaves these out."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from gpu_table import BACKEND, DEVICE, needs_op, on_a_gpu, on_device
from losses_table import DTYPES, LOSSES, MODES, logits, run
from small import RECIPE, file_hash, make_run

from kdcore.losses import dkd_loss

pytestmark = on_a_gpu
ON_GPU = {**RECIPE, "device": "cuda", "student": {"model": "cnn", "size": 2, "width": 0.25}}

ops = torch.ops.kdcore
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


# the ops beneath


def arguments(mode="class", rows=70, classes=37, dtype=torch.float32, **changed):
    """Those that the ops share."""
    student, teacher, target = on_device(*logits(rows, classes, dtype))
    target[::7] = -100
    stats = batch_statistics(student, teacher, target)[0] if mode == "class" else None
    numbers = {"temperature": 2.0, "alpha": 1.0, "beta": 8.0, "kd_weight": 0.7, "ce_weight": 0.3, "smoothing": 0.1}
    shared = {"student": student, "teacher": teacher, "index": target, "row_beta": None, "stats": stats, **numbers}
    shared |= {"eps": 1e-5, "ignore_index": -100, "normalize": MODES.index(mode), "decoupled": True}
    shared |= {"cross_entropy": True, "through": True}
    return list({**shared, **changed}.values())


def batch_statistics(student, teacher, target):
    found = [ops.col_stats(z, target, -100) for z in (student, teacher)]
    return torch.stack([part for n, mean, m2 in found for part in (mean, m2 / n.clamp(min=1))]), found


@needs_op
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@every_mode
@pytest.mark.parametrize("decoupled", [False, True])
def test_every_op_is_registered_as_it_behaves(mode, decoupled):
    student, *rest = arguments(mode, 6, 5, decoupled=decoupled)
    leaf, weight = student.clone().requires_grad_(), torch.rand(6, device=DEVICE)
    calls = [
        (ops.col_stats, student, rest[1], -100),
        (ops.fused, leaf, *rest, True, True),
        (ops.fused, student, *rest, False, False),
        (ops.forward, leaf, *rest),
        (ops.backward, weight, student, *rest, None, None),
    ]
    if mode == "class":
        sums = ops.sums(weight, student, *rest)
        calls.append((ops.sums, weight, student, *rest))
        calls.append((ops.backward, weight, student, *rest, sums, torch.tensor(5.0, device=DEVICE)))
    for op, *given in calls:
        torch.library.opcheck(op, tuple(given))


@needs_op
def test_torch_compile_without_a_graph_break_gives_the_same_numbers():
    student, teacher, target = on_device(*logits(33, 21, torch.float32))
    student.requires_grad_()

    def step(temperature):
        settings = {"normalize": "class", "ce_weight": 0.5, "backend": BACKEND}
        return dkd_loss(student, teacher, target, temperature=temperature, **settings)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for temperature in (4.0, 3.0):
        value, expected = compiled(temperature), step(temperature)
        assert torch.equal(value, expected)
        grads = [torch.autograd.grad(loss, student)[0] for loss in (value, expected)]
        torch.testing.assert_close(*grads)


@needs_op
@pytest.mark.parametrize("decoupled", [False, True])
def test_halves_that_share_statistics_and_sums_give_the_gradient_of_the_whole(decoupled):
    shared = arguments(rows=90, classes=13, dtype=torch.float64, decoupled=decoupled)
    student, teacher, target = shared[:3]
    halves = [slice(0, 37), slice(37, 90)]
    found = [batch_statistics(student[half], teacher[half], target[half])[1] for half in halves]
    stats = []
    for side in (0, 1):  # Chan's merge
        (n, mean, m2), (k, other, m2_other) = (part[side] for part in found)
        delta = other - mean
        stats += [mean + delta * k / (n + k), (m2 + m2_other + delta**2 * n * k / (n + k)) / (n + k)]
    count = found[0][0][0] + found[1][0][0]
    torch.testing.assert_close(torch.stack(stats), shared[4])
    shared[4] = torch.stack(stats)
    weights = torch.full((90,), 1.0, device=DEVICE, dtype=torch.float64) / count
    parts = [[student[half], teacher[half], target[half], *shared[3:]] for half in halves]
    sums = sum(ops.sums(weights[half], *part) for half, part in zip(halves, parts, strict=True))
    grads = [ops.backward(weights[half], *part, sums, count) for half, part in zip(halves, parts, strict=True)]
    whole = ops.fused(*shared[:4], None, *shared[5:], True, True)[2]
    torch.testing.assert_close(torch.cat(grads), whole)
    torch.testing.assert_close(ops.backward(weights, *shared, None, None), whole)


@needs_op
def test_wrong_arguments_are_errors_and_not_crashes():
    shared = arguments(rows=6, classes=5)
    for place, wrong in ((0, shared[0].cpu()), (1, shared[1].cpu()), (2, shared[2].cpu()), (1, shared[1].double())):
        with pytest.raises(RuntimeError):
            ops.fused(*shared[:place], wrong, *shared[place + 1 :], True, True)
    with pytest.raises(RuntimeError, match="needs stats"):
        ops.forward(*shared[:4], None, *shared[5:])
    with pytest.raises(RuntimeError, match="belong together"):
        ops.backward(torch.ones(6, device=DEVICE), *shared, torch.ones(2, 5, device=DEVICE), None)


# the same bits, without a wait


def everything(mode, dtype=torch.float32):
    """What each op returns."""
    shared = arguments(mode, rows=300, classes=300, dtype=dtype)
    weight = torch.linspace(-1, 1, 300, device=DEVICE, dtype=torch.float64).to(ops.forward(*shared)[0].dtype)
    results = [*ops.fused(*shared[:4], None, *shared[5:], True, True), *ops.forward(*shared)]
    results += [ops.backward(weight, *shared, None, None), *ops.col_stats(shared[0], shared[2], -100)]
    return [*results, ops.sums(weight, *shared)] if mode == "class" else results


@needs_op
@every_mode
@every_dtype
def test_the_same_call_gives_the_same_bits(mode, dtype):
    first = everything(mode, dtype)
    for _ in range(5):
        assert all(torch.equal(found, bits) for found, bits in zip(everything(mode, dtype), first, strict=True))


@needs_op
@every_mode
def test_whatever_is_in_memory_before_the_results_are_the_same(mode):
    first = everything(mode)
    for junk in (torch.nan, torch.inf, 1.0):
        poison = [torch.full((2**power,), junk, device=DEVICE) for power in range(4, 22)]
        del poison  # the allocator hands these blocks out again
        assert all(torch.equal(found, bits) for found, bits in zip(everything(mode), first, strict=True))


@contextmanager
def no_waiting():
    """Turns every wait for the device into an error."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_op
@both_losses
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_training_step_never_waits_for_the_device(loss, mode, reduction):
    inputs = on_device(*logits(64, 100, torch.float32))
    settings = {"normalize": mode, "ce_weight": 0.5, "reduction": reduction, "backend": BACKEND}
    with no_waiting():
        _, grad, _ = run(loss, *inputs, **settings)
    assert grad.shape == (64, 100)


@needs_op
@both_losses
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_captured_graph_replays_with_other_inputs(loss, mode, reduction):
    settings = {"normalize": mode, "ce_weight": 0.5, "reduction": reduction, "backend": BACKEND}
    inputs = on_device(*logits(64, 100, torch.float32))
    student = inputs[0].requires_grad_()

    def step():
        value = loss(*inputs, **settings)
        return value.detach(), torch.autograd.grad(value.sum(), student)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh = on_device(*logits(64, 100, torch.float32, seed=seed))
        fresh[2][seed::5] = -100  # the number of rows that count changes too
        with torch.no_grad():
            for old, new in zip(inputs, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        replayed = [part.clone() for part in captured]
        for found, bits in zip(replayed, step(), strict=True):
            assert torch.equal(found, bits)


@needs_op
@every_mode
def test_a_call_on_another_stream_runs_there(mode):
    first = everything(mode)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on the other stream would be done before
        found = everything(mode)
    stream.synchronize()
    assert all(torch.equal(part, bits) for part, bits in zip(found, first, strict=True))


# training


@both_losses
@every_mode
def test_losses_on_the_gpu_equal_those_on_the_cpu(loss, mode):
    student, teacher, target = logits(64, 100, torch.float32)
    found = {}
    for device in ("cpu", DEVICE):
        leaf = student.to(device).requires_grad_()
        value = loss(leaf, teacher.to(device), target.to(device), normalize=mode, ce_weight=1.0)
        value.backward()
        found[device] = value.detach().cpu(), leaf.grad.cpu()
    torch.testing.assert_close(found[DEVICE], found["cpu"], rtol=1e-5, atol=1e-6)


def test_the_same_recipe_gives_the_same_weights_on_the_gpu(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, recipe=ON_GPU).execute()
    hashes = {file_hash(tmp_path / name / "run" / "student.safetensors") for name in ("a", "b")}
    assert len(hashes) == 1


def test_bfloat16_trains_on_the_gpu(tmp_path):
    result = make_run(tmp_path, recipe={**ON_GPU, "precision": "bfloat16"}).execute()
    assert result["student"]["test_accuracy"] > 0.15
