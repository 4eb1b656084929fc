"""The same bits for any number of threads, calling thread, alignment or call before; and which instruction set runs."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from losses_table import COMPILED, DTYPES, EVERY_ISA, LOSSES, MODES, logits, needs_compiled, run, using

every_isa = pytest.mark.parametrize("isa", EVERY_ISA)
every_mode = pytest.mark.parametrize("mode", MODES)

# few enough elements for one thread; fewer rows than threads; one shard; many; by columns; past the caches
SHAPES = [(64, 100), (3, 4000), (31, 333), (257, 64), (1030, 37), (5, 8200), (33, 9001)]
PAST_CACHES = (200, 9001)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute(name, shape, dtype, mode, reduction="mean", seed=0, ignored=False):
    student, teacher, target = logits(*shape, dtype, seed)
    if ignored:
        target[::3] = -100
    kind = {"normalize": mode, "reduction": reduction, "ce_weight": 0.5 if name == "dkd" else 0.0, "backend": "cpu"}
    value, grad, parts = run(LOSSES[name], student, teacher, target, **kind)
    return value, grad, *parts.values()


def same_bits(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_isa
@every_mode
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_results_do_not_depend_on_the_number_of_threads(isa, mode, name, reduction):
    with using(isa):
        for number, shape in enumerate(SHAPES):
            call = (name, shape, (torch.float32, torch.bfloat16)[number % 2], mode, reduction, 0, number % 3 == 1)
            found = []
            for count in (1, 2, 3, 4):
                with threads(count):
                    found.append(compute(*call))
            assert all(same_bits(other, found[0]) for other in found[1:]), call


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_of_any_dtype_do_not_depend_on_the_number_of_threads(isa, dtype):
    with using(isa):
        for mode in MODES:
            for shape in ((257, 64), (9, 8200)):
                found = []
                for count in (1, 3):
                    with threads(count):
                        found.append(compute("dkd", shape, dtype, mode))
                assert same_bits(*found), (mode, shape)


@every_isa
@every_mode
def test_results_that_go_past_the_caches_do_not_depend_on_the_number_of_threads(isa, mode):
    student, teacher, target = logits(*PAST_CACHES, torch.float32)
    found = []
    with using(isa):
        for count in (1, 4):
            with threads(count):
                found.append(run(LOSSES["dkd"], student, teacher, target, normalize=mode, backend="cpu")[:2])
    assert same_bits(*found)


@every_isa
@pytest.mark.parametrize("shape", [(300, 37), (64, 3000), (5, 8200)], ids=str)
def test_col_stats_do_not_depend_on_the_number_of_threads(isa, shape):
    for dtype in DTYPES:
        z, _, index = logits(*shape, dtype)
        found = []
        with using(isa):
            for count in (1, 2, 3, 4):
                with threads(count):
                    found.append(torch.ops.kdcore.col_stats(z, index, -100))
        assert all(same_bits(other, found[0]) for other in found[1:])


@every_isa
def test_calls_at_the_same_time_give_the_bits_of_calls_alone(isa):
    # scratch memory is kept between calls, by thread: larger and smaller ones, of every algorithm, meet in it
    shapes = [(64, 10), (33, 333), (257, 64), (5, 8200), (2, 3), (12, 9001), (128, 100), (40, 1271)]
    calls = [
        (("kd", "dkd")[n % 2], shape, DTYPES[n % 4], MODES[(n + k) % 3], ("mean", "none")[k % 2], n, k == 1)
        for n, shape in enumerate(shapes)
        for k in range(3)
    ]
    with using(isa), threads(2):
        alone = [compute(*call) for call in calls]

        def work(seed):
            order = list(range(len(calls))) * 3
            random.Random(seed).shuffle(order)
            return [n for n in order if not same_bits(compute(*calls[n]), alone[n])]

        with ThreadPoolExecutor(4) as pool:
            wrong = [calls[n] for part in pool.map(work, range(4)) for n in part]
    assert wrong == []


@every_isa
@every_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_repeated_call_gives_the_same_bits_whatever_was_called_before(isa, mode, dtype):
    call = ("dkd", (33, 100), dtype, mode)
    with using(isa):
        first = compute(*call)
        for before in (call, ("kd", (5, 8200), torch.float64, "class"), ("dkd", (2, 2), torch.float16, "none")):
            compute(*before)
            assert same_bits(compute(*call), first)


@every_isa
@every_mode
@pytest.mark.parametrize("offset", [1, 3, 8, 15])
def test_any_alignment_gives_the_same_bits(isa, mode, offset):
    def moved(z):
        return torch.cat([torch.full((offset,), float("nan"), dtype=z.dtype), z.flatten()])[offset:].view_as(z)

    with using(isa):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((17, 37), (5, 8200)):
                student, teacher, target = logits(*shape, dtype)
                kind = {"normalize": mode, "ce_weight": 0.5, "backend": "cpu"}
                expected = run(LOSSES["dkd"], student, teacher, target, **kind)[:2]
                leaf = moved(student).requires_grad_()
                value = LOSSES["dkd"](leaf, moved(teacher), target, **kind)
                assert leaf.data_ptr() % 64
                assert same_bits((value, *torch.autograd.grad(value, leaf)), expected)


# the choice of an instruction set


LOADED_UNDER = """
import os
import sys
import torch  # once for all: most of the seconds

assert "kdcore._C" not in sys.modules
for name in sys.argv[1:]:
    if not os.fork():
        os.environ["KDCORE_CPU_ISA"] = name
        from kdcore import _C
        print(_C.cpu_isa(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@needs_compiled
def test_the_environment_lowers_the_instruction_set_to_one_that_it_names():
    command = [sys.executable, "-c", LOADED_UNDER, *COMPILED, "", "avx1024"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == [*COMPILED, COMPILED[-1], COMPILED[-1]]  # an unknown one changes nothing


@needs_compiled
def test_an_instruction_set_that_is_not_there_is_refused_and_the_choice_stays():
    from kdcore import _C

    before = _C.cpu_isa()
    for name in ("avx1024", "", "AVX2"):
        with pytest.raises(ValueError, match="no instruction set"):
            _C.set_cpu_isa(name)
    assert _C.cpu_isa() == before


@needs_compiled
def test_every_instruction_set_runs_its_own_kernels():
    if COMPILED == ("generic",):
        pytest.skip("this machine has no other")
    found = []
    for isa in COMPILED:
        with using(isa):
            found.append(compute("dkd", (64, 1000), torch.float32, "none")[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)
    assert not torch.equal(found[0], found[1])  # vectors of another width add up in another order
