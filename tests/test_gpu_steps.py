"""Losses with autograd, streams, CUDA graphs, gradient scalers, torch.compile; `make test` leaves these out."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from gpu_table import BACKEND, DEVICE, needs_op, on_a_gpu, on_device
from losses_table import LOSSES, MODES, Exact, check_grad, exact, logits, run

from kdcore.losses import dkd_loss, kd_loss
from kdcore.losses._ops import record_bytes

pytestmark = [*on_a_gpu, needs_op]

every_mode = pytest.mark.parametrize("mode", MODES)
both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
both_reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


def leaf(*shape, dtype=torch.float32, seed=0):
    """Student, teacher and labels on the device."""
    student, teacher, target = on_device(*logits(*shape, dtype, seed=seed))
    return student.requires_grad_(), teacher, target


# without a wait


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


@both_losses
@every_mode
@both_reductions
def test_training_steps_never_wait_for_the_device(loss, mode, reduction):
    inputs = on_device(*logits(64, 100, torch.float32))
    settings = {"normalize": mode, "ce_weight": 0.5, "reduction": reduction, "backend": BACKEND}
    with no_waiting():
        for step in range(200):
            _, grad, _ = run(loss, *inputs, temperature=1 + step / 50, **settings)
    assert grad.shape == (64, 100)


@both_losses
@every_mode
@both_reductions
@pytest.mark.parametrize("shape", [(64, 100), (20, 4096), (9, 8200)], ids=str)
def test_a_captured_graph_replays_with_other_inputs(loss, mode, reduction, shape):
    settings = {"normalize": mode, "ce_weight": 0.5, "reduction": reduction, "backend": BACKEND}
    inputs = leaf(*shape)

    def step():
        value = loss(*inputs, **settings)
        return value.detach(), torch.autograd.grad(value.sum(), inputs[0])[0]

    graph, captured = capture(step)
    addresses = [part.data_ptr() for part in captured]
    for seed in (1, 2):
        fresh = on_device(*logits(*shape, torch.float32, seed=seed))
        fresh[2][seed::5] = -100  # the number of rows that count changes too
        with torch.no_grad():
            for old, new in zip(inputs, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        assert [part.data_ptr() for part in captured] == addresses
        replayed = [part.clone() for part in captured]
        for found, bits in zip(replayed, step(), strict=True):
            assert torch.equal(found, bits)


def capture(step):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@both_losses
@every_mode
def test_a_step_on_another_stream_runs_there(loss, mode):
    student, teacher, target = leaf(64, 100)
    settings = {"normalize": mode, "backend": BACKEND}
    (expected,) = torch.autograd.grad(loss(student, teacher, target, **settings), student)
    junk, stream = torch.full_like(student, 7.0), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on the other stream would read the junk
        late = torch.where(junk == 7, student.detach(), junk).requires_grad_()
        (found,) = torch.autograd.grad(loss(late, teacher, target, **settings), late)
    stream.synchronize()
    assert torch.equal(found, expected)


# torch.compile


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*", "ignore::UserWarning:torch.*")
@both_losses
@every_mode
@both_reductions
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_graph_serves_every_temperature(loss, mode, reduction, backend):
    torch.compiler.reset()
    traced = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)

    def compare(tick):
        settings = {"temperature": 1 + tick / 3, "ce_weight": 0.1 + tick, "normalize": mode, "reduction": reduction}
        student, teacher, target = leaf(33, 21, seed=tick)
        found = []
        for call in (loss, traced):
            value = call(student, teacher, target, backend=BACKEND, **settings)
            found.append((value.detach(), torch.autograd.grad(3 * value.sum(), student)[0]))
        torch.testing.assert_close(*found)

    compare(0)
    compare(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tick in range(2, 6):
            compare(tick)


# what autograd asks of a loss


@both_losses
@every_mode
def test_a_gradient_scalers_factor_keeps_what_float16_would_lose(loss, mode):
    scale = 65536.0
    inputs = logits(256, 1000, torch.float16)
    truth = exact(loss, *inputs, normalize=mode)
    student, teacher, target = on_device(*inputs)
    value = loss(student.requires_grad_(), teacher, target, normalize=mode, backend=BACKEND)
    (grad,) = torch.autograd.grad(value * scale, student)
    assert grad.isfinite().all()
    check_grad(grad.cpu(), Exact(truth.value * scale, truth.grad * scale, {}, truth.terms * scale))


@both_losses
@every_mode
@both_reductions
def test_a_kept_graph_gives_its_gradient_again(loss, mode, reduction):
    student, teacher, target = leaf(33, 100)
    value = loss(student, teacher, target, normalize=mode, reduction=reduction, backend=BACKEND).sum()
    first, again = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    (thrice,) = torch.autograd.grad(3 * value, student)
    assert torch.equal(first, again)
    torch.testing.assert_close(thrice, 3 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, student)


@every_mode
def test_two_losses_on_one_student_add_their_gradients(mode):
    student, teacher, target = leaf(33, 100)

    def losses():
        yield dkd_loss(student, teacher, target, normalize=mode, backend=BACKEND)
        yield 0.5 * kd_loss(student, teacher.flip(0), target, normalize=mode, ce_weight=1.0, backend=BACKEND)

    sum(losses()).backward()
    expected = sum(torch.autograd.grad(value, student)[0] for value in losses())
    torch.testing.assert_close(student.grad, expected)


@both_losses
@every_mode
@both_reductions
def test_a_factor_of_zero_or_infinity_reaches_every_element(loss, mode, reduction):
    student, teacher, target = leaf(33, 100)
    value = loss(student, teacher, target, normalize=mode, reduction=reduction, backend=BACKEND)
    grads = [
        torch.autograd.grad(value, student, torch.full_like(value, factor), retain_graph=True)[0]
        for factor in (0.0, torch.inf)
    ]
    assert not grads[0].any()
    assert not grads[1].isfinite().any()


# memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 1000), (64, 128256)], ids=str)
@both_losses
@every_mode
def test_a_step_needs_little_more_memory_than_its_gradient(loss, mode, dtype, shape):
    student, teacher, target = (z.to(DEVICE) for z in logits(*shape, dtype))
    student.requires_grad_()

    def step():
        loss(student, teacher, target, normalize=mode, ce_weight=0.5, backend=BACKEND).backward()

    step()  # torch's own first allocations
    student.grad = None
    torch.cuda.empty_cache()  # a kept block may be given out whole, though it is larger
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    gradient = student.numel() * student.element_size()
    wide = mode == "class" and shape[1] > 4096  # eight numbers of each class are as much as eight rows in float32
    allowed = 1.05 * gradient + (record_bytes(*shape, MODES.index(mode), False) if wide else 0)
    assert torch.cuda.max_memory_allocated() - before <= allowed
