"""Times the losses on a GPU: ``bench_losses.py --device cuda``. README.md says how to read it."""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol

import cuda_report
import losses_report as report
import torch
from competitors import Objective, Way, contenders, ours
from losses_cases import DTYPES, STRONGEST, Case, Data, check, exact, inputs, result, step
from torch import Tensor

from kdcore.losses import available_backends

SHAPES = ("1024x100", "4096x1000", "8192x21841", "8192x128256")
AGAINST = ("eager textbook", "eager careful A", "eager careful B", *STRONGEST)
SMALL_BYTES = 20e6  # of an input; below, what the host does is a part of the time, and is looked at by itself
EXACT_ELEMENTS = 2**28  # above, the definition in float64 would not fit: everyone is compared with ours
DEADLINE = 420.0  # seconds; no case begins after it
CASE_SECONDS, LEAST, MOST = 1.5, 7, 100  # of a case's rounds
SAMPLE_SECONDS, CALLS_MOST = 0.002, 20  # of a sample
WALL_CALLS = 1000
NO_MEMORY = "short of memory"

Call = Callable[[], object]


class Gauge(Protocol):
    """What is measured of a call."""

    device: str
    backend: str
    quick: bool

    def seconds(self, call: Call, count: int) -> float: ...

    def wall(self, call: Call, count: int) -> float: ...

    def launches(self, call: Call) -> int: ...

    def peak_bytes(self, call: Call) -> int: ...

    def graph(self, way: Way, data: Data) -> tuple[Call, tuple[Tensor, Tensor]]: ...

    def release(self) -> None: ...


@dataclass
class CudaGauge:
    quick: bool
    device: str = "cuda"
    backend: str = "cuda"

    def __post_init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def seconds(self, call: Call, count: int) -> float:
        """A call's, by events; the second-level cache is flushed before each."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / count / 1e3

    def wall(self, call: Call, count: int) -> float:
        """A call's, with one wait at the end: the host's time or the device's, whichever is longer."""
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    def launches(self, call: Call) -> int:
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        device = torch.autograd.DeviceType.CUDA
        names = [event.name for event in profile.events() if event.device_type == device]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names)

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.empty_cache()  # a kept block may be given out whole, though it is larger
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, way: Way, data: Data) -> tuple[Call, tuple[Tensor, Tensor]]:
        """Loss and gradient in a CUDA graph: its replay, and where it writes them."""

        def both() -> tuple[Tensor, Tensor]:
            loss = way(*data)
            return loss.detach(), torch.autograd.grad(loss, data[0])[0]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            both()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = both()
        graph.replay()
        return graph.replay, found

    def release(self) -> None:
        torch._dynamo.reset()  # the next case's shapes are compiled as constants again
        torch.cuda.empty_cache()


# -- cases


def cases() -> Iterator[Case]:
    objectives = (Objective(cross_entropy=True), Objective(decoupled=False, normalize="none"))
    for objective, dtype, shape in product(objectives, DTYPES, SHAPES):
        goal = objective.decoupled
        yield Case(shape, dtype, objective, AGAINST if goal else (*STRONGEST, *liger()), goal)


def liger() -> tuple[str, ...]:
    return ("eager liger",) if importlib.util.find_spec("liger_kernel") else ()


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in cases()
        if case.shape in args.shapes and case.dtype in args.dtypes and case.objective.normalize in args.modes
    ]


# -- one case


@dataclass
class Found:
    """Everyone who computes the same, and what else is to be said."""

    ways: dict[str, Way]
    errors: dict[str, list[float]]
    notes: list[str]

    def leave_out(self, name: str, error: Exception) -> None:
        self.ways.pop(name, None)
        self.notes.append(f"{name}: {reason(error)}")


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return NO_MEMORY
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def checked(case: Case, ways: dict[str, Way], data: Data) -> Found:
    """Compiles everyone, and compares loss and gradient; who is wrong, or cannot run, is left out, with a note."""
    found = Found(dict(ways), {}, [])
    rows, classes = case.size
    truth = exact(case, data) if rows * classes <= EXACT_ELEMENTS else result(ways["ours"], data)
    for name, way in ways.items():
        try:
            found.errors[name] = check(case, name, result(way, data), truth)
        except Exception as error:
            if name == "ours":
                raise
            found.leave_out(name, error)
        data[0].grad = None
    return found


def reduced(case: Case, who: dict[str, Call], gauge: Gauge) -> dict[str, Way]:
    """The fastest compiled code, in CUDA graphs of torch's own."""
    compiled = [name for name in who if name.startswith("compile ")]
    if not compiled:
        return {}
    best = min(compiled, key=lambda name: min(gauge.seconds(who[name], 1) for _ in range(5)))
    name = best.replace("compile", "reduce")
    (way,) = contenders(case.objective, (name,)).values()

    def call(*data: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return way(*data)

    return {name: call}


def add_graphs(case: Case, data: Data, who: dict[str, Call], found: Found, gauge: Gauge) -> None:
    truth = result(found.ways["ours"], data)
    who["ours graph"], replayed = gauge.graph(found.ways["ours"], data)
    found.errors["ours graph"] = check(case, "ours graph", replayed, truth)
    for name, way in reduced(case, who, gauge).items():
        call = step(way, data)
        try:
            for _ in range(3):  # the first calls warm up and record
                call()
            found.errors[name] = check(case, name, result(way, data), truth)
            who[name] = call
        except Exception as error:
            found.leave_out(name, error)


def rounds(who: dict[str, Call], gauge: Gauge) -> dict[str, list[float]]:
    """Seconds a call, of everyone once a round and each time in another order."""
    counts = {name: calls_per_sample(call, gauge) for name, call in who.items()}
    taken: dict[str, list[float]] = {name: [] for name in who}
    order, start = random.Random(0), time.monotonic()
    least, seconds = (2, 0.0) if gauge.quick else (LEAST, CASE_SECONDS)
    for number in range(MOST):
        if number >= least and time.monotonic() - start > seconds:
            break
        for name in order.sample(list(who), len(who)):
            who[name]()
            taken[name].append(gauge.seconds(who[name], counts[name]))
    return taken


def calls_per_sample(call: Call, gauge: Gauge) -> int:
    once = min(gauge.seconds(call, 1) for _ in range(2))
    return max(1, min(CALLS_MOST, -int(-SAMPLE_SECONDS // once)))


def run_case(case: Case, gauge: Gauge) -> dict[str, Any]:
    data = inputs(case, gauge.device)
    student, teacher = data[0].detach(), data[1]
    found = checked(
        case, {"ours": ours(case.objective, gauge.backend), **contenders(case.objective, case.against)}, data
    )
    who: dict[str, Call] = {name: step(way, data) for name, way in found.ways.items()}
    memory = {name: peak_gradients(call, data[0], gauge) for name, call in who.items()}
    small = student.nbytes < SMALL_BYTES
    if small:
        add_graphs(case, data, who, found, gauge)
    who["ours again"] = step(found.ways["ours"], data)  # shows the noise
    launches = {name: gauge.launches(call) for name, call in who.items()}
    wall = 20 if gauge.quick else WALL_CALLS
    walls = {name: gauge.wall(call, wall) for name, call in who.items()} if small else {}
    out = torch.empty_like(student)
    floors = {"add": partial(torch.add, student, teacher, out=out), "copy": partial(out.copy_, student)}
    measured = rounds({**who, **floors}, gauge)
    details = {"errors": found.errors, "notes": found.notes, "launches": launches, "peak_gradients": memory}
    return cuda_report.record(case, student.element_size(), measured, walls, details)


def peak_gradients(call: Call, student: Tensor, gauge: Gauge) -> float:
    student.grad = None
    return gauge.peak_bytes(call) / student.nbytes


# -- the run


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch finds no CUDA device")
    if "cuda" not in available_backends():
        sys.exit("no compiled op for CUDA: build it with `python setup.py build_ext --inplace`")
    gauge, start = CudaGauge(args.quick), time.monotonic()
    about = cuda_report.machine(args)
    print(cuda_report.line(about), flush=True)
    records, skipped = run_all(chosen_cases(args), gauge, start + DEADLINE)
    about |= {"skipped": skipped, "minutes": round((time.monotonic() - start) / 60, 1)}
    lost = [case for case, why in skipped.items() if why != NO_MEMORY]
    args.whole &= not lost
    about["goals"] = cuda_report.goals(records) if args.whole else []
    report.write(args, about, records, cuda_report.tables(about, records))
    sys.exit(1 if lost or not records else 0)


def run_all(chosen: list[Case], gauge: Gauge, deadline: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    records, skipped = [], {}
    for case in chosen:
        if time.monotonic() > deadline:
            skipped[f"{case.name} {case.shape}"] = "out of time"
            continue
        try:
            records.append(run_case(case, gauge))
            print(cuda_report.progress(records[-1]), flush=True)
        except Exception as error:  # of ours; what the other cases gave is kept
            skipped[f"{case.name} {case.shape}"] = reason(error)
            print(f"{case.name} {case.shape}: {reason(error)}", flush=True)
        gauge.release()
    return records, skipped
