"""What holds on the CPU holds on a GPU: the ops, the same bits, and training; `make test` leaves these out."""

from __future__ import annotations

import pytest
import torch
from gpu_table import DEVICE, needs_op, on_a_gpu, on_device
from losses_table import DTYPES, LOSSES, MODES, logits
from small import RECIPE, file_hash, make_run
from test_gpu_steps import no_waiting

from kdcore import autosize
from kdcore.losses._ops import numbers_tensor
from kdcore.losses.terms import KD
from kdcore.training import device as devices
from kdcore.training import state
from kdcore.training.ema import Average

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


@pytest.fixture
def nothing_by_chance():
    """What an op leaves unwritten, as the padding of a record, is then the same in every call."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def calls_of_every_op(mode, decoupled):
    student, *rest = arguments(mode, 6, 5, decoupled=decoupled)
    leaf, weight = student.clone().requires_grad_(), torch.rand(6, device=DEVICE)
    record = ops.prepare(student, *rest, True)[2]
    switches = (*rest[-4:], True)
    yield ops.col_stats, student, rest[1], -100
    yield ops.complete, torch.tensor(3.0, device=DEVICE), student, rest[0], record, *switches
    dynamic = [*rest[:4], numbers_tensor(rest[4:11]), *rest[11:]]
    for name, before, first, after in (
        ("fused", (), leaf, (True, True)),
        ("fused", (), student, (False, False)),
        ("prepare", (), leaf, (True,)),
        ("forward", (), leaf, ()),
        ("backward", (weight,), student, (None, None)),
    ):
        yield getattr(ops, name), *before, first, *rest, *after
        yield getattr(ops, f"{name}_dynamic"), *before, first, *dynamic, *after
    if mode == "class":
        yield ops.sums, weight, student, *rest
        sums = ops.sums(weight, student, *rest)
        yield ops.backward, weight, student, *rest, sums, torch.tensor(5.0, device=DEVICE)


@needs_op
@pytest.mark.usefixtures("nothing_by_chance")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning")
@every_mode
@pytest.mark.parametrize("decoupled", [False, True])
def test_every_op_is_registered_as_it_behaves(mode, decoupled):
    for op, *given in calls_of_every_op(mode, decoupled):
        torch.library.opcheck(op, tuple(given))


@needs_op
@every_mode
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_call_with_a_gradient_is_the_two_of_autograd(mode, mean, dtype):
    for rows, classes in ((33, 100), (5, 5001)):
        shared = arguments(mode, rows, classes, dtype, stats=None)
        loss, parts, grad = ops.fused(*shared, mean, True)
        again, parts_again, record = ops.prepare(*shared, mean)
        assert torch.equal(again, loss)
        assert torch.equal(parts_again, parts)
        for factor in (1.0, 3.0):  # the record may be used again
            found = ops.complete(torch.tensor(factor, device=DEVICE), *shared[:2], record, *shared[-4:], mean)
            torch.testing.assert_close(found, factor * grad)


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
    record = ops.prepare(*shared, True)[2]
    for wrong in (record[:-1], record.cpu()):
        with pytest.raises(RuntimeError, match="record is not that of these logits"):
            ops.complete(torch.tensor(1.0, device=DEVICE), *shared[:2], wrong, *shared[-4:], True)
    with pytest.raises(RuntimeError, match="belong together"):
        ops.backward(torch.ones(6, device=DEVICE), *shared, torch.ones(2, 5, device=DEVICE), None)


# the same bits


def everything(mode, dtype=torch.float32, shape=(300, 300)):
    """What each op returns; of a record, the gradient that is made from it."""
    shared = arguments(mode, *shape, dtype=dtype)
    unsettled = [*shared[:4], None, *shared[5:]]
    weight = torch.linspace(-1, 1, shape[0], device=DEVICE, dtype=torch.float64).to(ops.forward(*shared)[0].dtype)
    loss, parts, record = ops.prepare(*unsettled, True)
    results = [loss, parts, ops.complete(torch.full_like(loss, 3), *shared[:2], record, *shared[-4:], True)]
    results += [*ops.fused(*unsettled, True, True), *ops.forward(*shared)]
    results += [ops.backward(weight, *shared, None, None), *ops.col_stats(shared[0], shared[2], -100)]
    return [*results, ops.sums(weight, *shared)] if mode == "class" else results


@needs_op
@every_mode
@every_dtype
@pytest.mark.parametrize("shape", [(300, 300), (20, 4096), (9, 8200)], ids=str)
def test_the_same_call_gives_the_same_bits(mode, dtype, shape):
    first = everything(mode, dtype, shape)
    for _ in range(20):
        assert all(torch.equal(found, bits) for found, bits in zip(everything(mode, dtype, shape), first, strict=True))


@needs_op
@every_mode
def test_whatever_is_in_memory_before_the_results_are_the_same(mode):
    first = everything(mode)
    for junk in (torch.nan, torch.inf, 1.0):
        poison = [torch.full((2**power,), junk, device=DEVICE) for power in range(4, 22)]
        del poison  # the allocator hands these blocks out again
        assert all(torch.equal(found, bits) for found, bits in zip(everything(mode), first, strict=True))


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


@needs_op
@every_mode
def test_a_call_with_another_current_device_runs_on_that_of_its_tensors(mode):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first = everything(mode)
    with torch.cuda.device(1):
        found = everything(mode)
        assert torch.cuda.current_device() == 1
    assert {part.device for part in found} == {first[0].device}
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


def test_the_seconds_of_members_are_the_gpus_own(tmp_path):
    stage = make_run(tmp_path, recipe=ON_GPU).execute()["stages"][1]
    assert 0 < stage["member_seconds"]["teacher"] < stage["member_seconds"]["student"]
    assert sum(stage["member_seconds"].values()) <= stage["seconds"]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_group_of_one_process_gives_what_no_group_gives(loss):
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student, teacher, target = on_device(*logits(64, 21, torch.float32))
        found = []
        for group in (None, dist.group.WORLD):
            leaf = student.clone().requires_grad_()
            value = loss(leaf, teacher, target, normalize="class", ce_weight=1.0, group=group, backend="reference")
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
        for alone, shared in zip(*found, strict=True):
            torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-7)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_count_of_steps_lies_after_a_resume_where_a_fresh_one_has_it(fused):
    made = []
    for _ in range(2):
        weight = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        weight.grad = torch.ones_like(weight)
        made.append((weight, torch.optim.AdamW([weight], fused=fused)))
    (weight, fresh), (other, resumed) = made
    fresh.step()
    loaded = {name: tensor.to(DEVICE) for name, tensor in state._optimizer_tensors(fresh)}
    state._restore_optimizer(resumed, state._numbers(fresh), loaded)
    assert resumed.state[other]["step"].device == fresh.state[weight]["step"].device


def test_the_moving_average_never_waits_for_the_device():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(DEVICE)
    average = Average(module, 0.9)
    with no_waiting():
        for _ in range(3):
            average.update(module)


def test_a_loss_has_labels_on_the_device_where_images_stay_on_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.training.session.fits", lambda *given: False)
    devices_of_labels = []
    build = KD.build.__func__

    def noting(cls, shapes, options):
        devices_of_labels.append(shapes.labels.device.type)
        return build(cls, shapes, options)

    monkeypatch.setattr(KD, "build", classmethod(noting))
    make_run(tmp_path, recipe=ON_GPU, sets=["train.epochs=1"]).execute()
    assert devices_of_labels[-1] == "cuda"


def test_bfloat16_trains_on_the_gpu(tmp_path):
    result = make_run(tmp_path, recipe={**ON_GPU, "precision": "bfloat16"}).execute()
    assert result["student"]["test_accuracy"] > 0.15


def test_float16_trains_on_the_gpu(tmp_path):
    result = make_run(tmp_path, recipe={**ON_GPU, "precision": "float16"}).execute()
    assert result["student"]["test_accuracy"] > 0.15


def test_the_batch_size_that_fits_the_gpu_is_bounded_by_the_split(tmp_path):
    assert make_run(tmp_path, recipe=ON_GPU, sets=["data.batch_size=auto"]).view.data.batch_size == 128


def test_the_batch_size_is_the_largest_that_leaves_memory_free(tmp_path, monkeypatch):
    """Beside what is held before, which is not free in the first place."""
    held, peaks = torch.empty(2**30, dtype=torch.uint8, device=DEVICE), []
    made, watch = make_run(tmp_path, recipe=ON_GPU, sets=["precision=float16"]), devices.watched_memory

    def watched(place):
        peak = watch(place)
        return lambda: peaks.append(peak()) or peaks[-1]

    def largest(free):
        peaks.clear()
        monkeypatch.setattr(devices, "free_memory", lambda place: free)
        return autosize.largest(made.view, made.host.catalog, made.settings, made.context.load, 1024)

    monkeypatch.setattr(devices, "watched_memory", watched)
    assert largest(2**40) == largest(2**40) == 1024  # the first one also takes what cuBLAS keeps
    assert 0 < max(peaks) < held.nbytes
    assert largest(max(peaks)) < 1024


@pytest.mark.parametrize("sets", [["precision=float16"], ["cache.views=2"], ["train.accumulate=4"]])
def test_a_batch_size_is_found_for_what_the_stage_will_be(tmp_path, sets):
    result = make_run(tmp_path, recipe=ON_GPU, sets=["data.batch_size=auto", "train.epochs=1", *sets]).execute()
    assert result["recipe"]["data"]["batch_size"] == 128
