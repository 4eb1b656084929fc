"""Times kdcore's losses, forward and backward, against other ways to compute them. README.md says how to read it.

python benchmarks/bench_losses.py                       # the goals' cases and a lean set of others; writes results/
python benchmarks/bench_losses.py --shapes 64x10,256x100 --modes class          # prints; writes with --out FOLDER
python benchmarks/bench_losses.py --quick               # a few rounds of each: only to see that it works
python benchmarks/bench_losses.py --device cuda         # bench_cuda.py: other shapes, and what a GPU can be asked
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import bench_cuda
import losses_report as report
import torch
from bench_cuda import SHAPES as CUDA_SHAPES
from competitors import Limits, Objective, Way, autograd_alone, contenders, ours, raw_call
from losses_cases import DTYPES, EVERYONE, MODES, STRONGEST, Case, Data, check, exact, inputs, result, step

from kdcore.losses import available_backends

SHAPES = ("64x10", "256x100", "1024x100", "256x1000", "1024x1000", "4096x1000", "512x21841", "64x128256")
FLOORS = ("floor plain", "floor streaming")

# glibc maps large tensors anew for every call; 4 KB faults then cost more than the arithmetic, for everyone
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

SAMPLE_SECONDS = 0.002  # a sample is at least that many calls long
BLOCK_SECONDS = 0.5  # the kernel counts CPU time in ticks of 10 ms: rounds are judged in blocks of this length
FOREIGN_SHARE = 0.06  # of the threads' time; above it a block is repeated
ROUNDS_MOST = 400

Rounds = list[dict[str, float]]  # seconds by subject


@dataclass(frozen=True)
class Subject:
    name: str
    call: Callable[[], object]
    isa: str | None = None  # the instruction set that it is forced to


@dataclass(frozen=True)
class Bench:
    backend: str
    threads: int
    isa: str | None  # what kdcore uses unless told otherwise; None while there is no compiled op
    lower_isas: tuple[str, ...]
    limits: Limits
    ghz: float
    quick: bool


# -- cases


def goal_cases() -> Iterator[Case]:
    for shape in SHAPES:
        yield Case(shape, "float32", Objective(), EVERYONE, goal=True)


def lean_cases() -> Iterator[Case]:
    lean = [(shape, "float32", Objective(decoupled=False, normalize="none")) for shape in SHAPES]
    lean += [(shape, "bfloat16", Objective()) for shape in ("256x1000", "1024x1000", "512x21841")]
    lean += [(shape, "float32", Objective(cross_entropy=True)) for shape in ("256x1000", "1024x1000")]
    for mode, shape in product(("none", "instance"), ("256x100", "1024x1000", "64x128256")):
        lean.append((shape, "float32", Objective(normalize=mode)))
    lean += [("1024x1000", "float32", Objective(decoupled=False, normalize=mode)) for mode in ("class", "instance")]
    for shape, dtype, objective in lean:
        yield Case(shape, dtype, objective, STRONGEST)


def full_cases() -> Iterator[Case]:
    for dtype, decoupled, mode, ce, shape in product(DTYPES, (True, False), MODES, (False, True), SHAPES):
        objective = Objective(decoupled, mode, ce)
        yield Case(shape, dtype, objective, EVERYONE, goal=dtype == "float32" and objective == Objective())


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    cases = full_cases() if args.full else (*goal_cases(), *lean_cases())
    return [
        case
        for case in cases
        if case.shape in args.shapes and case.dtype in args.dtypes and case.objective.normalize in args.modes
    ]


# -- what is timed


def subjects(case: Case, ways: dict[str, Way], data: Data, bench: Bench) -> list[Subject]:
    found = [Subject(name, step(way, data)) for name, way in ways.items()]
    found.append(Subject("ours again", step(ways["ours"], data)))  # shows the noise
    if bench.isa is not None:
        found.append(Subject("raw", partial(raw_call(case.objective), data[0].detach(), *data[1:])))
    return found + variants(case, data, bench) if case.goal else found


def variants(case: Case, data: Data, bench: Bench) -> list[Subject]:
    with_ce = ours(replace(case.objective, cross_entropy=True), bench.backend)
    half = inputs(replace(case, dtype="bfloat16"), "cpu")
    found = [Subject("ours + CE", step(with_ce, data)), Subject("autograd alone", autograd_alone())]
    found.append(Subject("ours bfloat16", step(ours(case.objective, bench.backend), half)))
    for isa in bench.lower_isas:
        found.append(Subject(f"ours {isa}", step(ours(case.objective, bench.backend), data), isa))
    student, teacher = data[0].detach(), data[1]
    for name in FLOORS:
        found.append(Subject(name, bench.limits.five_passes(student, teacher, streaming=name == "floor streaming")))
    return found


def checked(case: Case, ways: dict[str, Way], data: Data, bench: Bench) -> dict[str, list[float]]:
    """Compares everyone's loss and gradient with the definition in float64; a wrong one ends the run."""
    truth = exact(case, data)
    errors = {name: check(case, name, result(way, data), truth) for name, way in ways.items()}
    if bench.isa is not None:
        loss, _, gradient = raw_call(case.objective)(data[0].detach(), *data[1:])
        errors["raw"] = check(case, "raw", (loss, gradient), truth)
    return errors


# -- timing


def sample(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


@contextmanager
def forced(isa: str | None, usual: str | None) -> Iterator[None]:
    if isa is None:
        yield
        return
    from kdcore import _C

    _C.set_cpu_isa(isa)
    try:
        yield
    finally:
        _C.set_cpu_isa(usual)


def calls_per_sample(subject: Subject, bench: Bench) -> int:
    with forced(subject.isa, bench.isa):
        subject.call()
        once = min(sample(subject.call, 1) for _ in range(3))
    return max(1, min(2000, -int(-SAMPLE_SECONDS // once)))


def one_round(who: list[Subject], counts: dict[str, int], bench: Bench) -> dict[str, float]:
    times = {}
    for subject in who:
        with forced(subject.isa, bench.isa):
            subject.call()
            times[subject.name] = sample(subject.call, counts[subject.name])
    return times


def block(who: list[Subject], counts: dict[str, int], bench: Bench, order: random.Random) -> tuple[Rounds, float]:
    """Rounds, each in another order, and the share of the CPU time that other processes took."""
    rounds: Rounds = []
    start, busy, own = time.monotonic(), busy_seconds(), own_seconds()
    while not rounds or time.monotonic() - start < BLOCK_SECONDS:
        rounds.append(one_round(order.sample(who, len(who)), counts, bench))
    foreign = (busy_seconds() - busy) - (own_seconds() - own)
    return rounds, foreign / (time.monotonic() - start) / bench.threads


def busy_seconds() -> float:
    """Of all processes on all cores, and what the host took (steal)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def measure(who: list[Subject], bench: Bench, seconds: float, least: int) -> dict[str, Any]:
    counts = {subject.name: calls_per_sample(subject, bench) for subject in who}
    kept: Rounds = []
    order = random.Random(0)  # who comes after whom decides what is left in the caches
    spent = wasted = 0.0
    dropped = disturbed = 0
    while len(kept) < least or (spent < seconds and len(kept) < ROUNDS_MOST):
        start = time.monotonic()
        rounds, foreign = block(who, counts, bench, order)
        took = time.monotonic() - start
        if foreign > FOREIGN_SHARE and wasted < seconds:  # repeating ends after as much time again
            wasted, dropped = wasted + took, dropped + len(rounds)
            continue
        spent, kept = spent + took, kept + rounds
        disturbed += len(rounds) if foreign > FOREIGN_SHARE else 0
    times = {subject.name: [times[subject.name] for times in kept] for subject in who}
    return {"rounds": len(kept), "dropped": dropped, "disturbed": disturbed, "calls": counts, "seconds": times}


def run_case(case: Case, bench: Bench) -> dict[str, Any]:
    data = inputs(case, "cpu")
    ways = {**contenders(case.objective, case.against), "ours": ours(case.objective, bench.backend)}
    errors = checked(case, ways, data, bench)  # compiles, too
    who = subjects(case, ways, data, bench)
    seconds, least = (0.2, 2) if bench.quick else (14.0, 11) if case.goal else (6.0, 9)
    measured = measure(who, bench, seconds, least)
    torch._dynamo.reset()  # the next case's shapes are compiled as constants again
    return report.record(case, measured, errors, bench)


# -- the run


def parse() -> argparse.Namespace:
    def several(*allowed: str) -> dict[str, Any]:
        def of(text: str) -> list[str]:
            names = text.split(",")
            if not set(names) <= set(allowed):
                raise argparse.ArgumentTypeError(f"use some of {','.join(allowed)}")
            return names

        return {"type": of, "metavar": "A,B"}

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", **several(*SHAPES, *CUDA_SHAPES))
    parser.add_argument("--dtypes", **several(*DTYPES))
    parser.add_argument("--modes", **several(*MODES))
    parser.add_argument("--full", action="store_true", help="every combination against everyone: hours")
    parser.add_argument("--quick", action="store_true", help="two rounds of each case: no figures to quote")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="pinned to as many cores (default: 2)")
    parser.add_argument("--default-allocator", action="store_true", help="leave malloc as it is")
    parser.add_argument("--ghz", type=float, help="clock for the port bound (default: measured)")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table (default: results/ for whole runs)")
    args = parser.parse_args()
    args.whole = not args.quick and args.threads == parser.get_default("threads")
    everything = {"shapes": SHAPES if args.device == "cpu" else CUDA_SHAPES, "dtypes": DTYPES, "modes": MODES}
    for name, values in everything.items():
        args.whole &= getattr(args, name) is None
        setattr(args, name, getattr(args, name) or list(values))
    return args


def prepare_process(args: argparse.Namespace) -> None:
    """Pins to the first cores and starts anew with malloc's settings, which are read at a process's start alone."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    missing = {} if args.default_allocator else {k: v for k, v in ALLOCATOR.items() if os.environ.get(k) != v}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
    torch.set_num_threads(args.threads)


def prepare(args: argparse.Namespace) -> Bench:
    compiled = "cpu" in available_backends()
    isa, lower = None, ()
    if compiled:
        from kdcore import _C

        isa, isas = _C.cpu_isa(), tuple(_C.available_isas())  # the least first
        lower = isas[: isas.index(isa)]
    else:
        print("no compiled op: timing the reference; these are no figures of kdcore", flush=True)
    limits = Limits(args.threads)
    return Bench(
        backend="cpu" if compiled else "reference",
        threads=args.threads,
        isa=isa,
        lower_isas=lower,
        limits=limits,
        ghz=args.ghz or limits.clock_ghz(),
        quick=args.quick,
    )


def main() -> None:
    args = parse()
    if args.device == "cuda":
        bench_cuda.main(args)
        return
    prepare_process(args)
    bench, start = prepare(args), time.monotonic()
    about = report.machine(args, bench.isa, bench.ghz)
    print(report.line(about), flush=True)
    records = []
    for case in chosen_cases(args):
        records.append(run_case(case, bench))
        print(report.progress(records[-1], time.monotonic() - start), flush=True)
    about["minutes"] = round((time.monotonic() - start) / 60, 1)
    about["goals"] = report.goals(records, bench.isa) if args.whole else []
    report.write(args, about, records, report.tables(about, records))


if __name__ == "__main__":
    main()
