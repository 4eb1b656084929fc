"""From the samples of bench_cuda.py to its records, tables and the verdict on each goal."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import Any

import losses_report as report
import numpy as np
import torch
from losses_report import Record, at_least, at_most, elements, geometric, mean_of_shapes, number, ratio, spread, table

WHOLE_ROWS_UP_TO = 2048  # classes; csrc/cuda/plan.h has the same bound
MINIMUM = 3  # passes over an array of B x C: both are read, the gradient is written
RATIOS = ("eager textbook", "eager careful", "compile careful", "compile analytic", "eager liger")
GRAPHS = ("reduce careful A", "reduce careful B", "reduce analytic")
LARGE_BYTES = 300e6  # of an input: what else a call does is then nothing beside its traffic
MEMORY_FROM = 4_000_000  # elements: below, the record of a row's numbers is no longer small beside the row


# -- records


def record(
    case: Any, itemsize: int, seconds: dict[str, list[float]], walls: dict[str, float], details: dict[str, Any]
) -> Record:
    times = {name: np.array(values) for name, values in seconds.items()}
    return {
        "case": case.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "goal": case.goal,
        "rounds": len(seconds["ours"]),
        "ms": {name: spread(values * 1e3) for name, values in times.items()},
        "ratios": {name: spread(values / times["ours"]) for name, values in times.items()},
        "wall_us": {name: report.rounded(value * 1e6) for name, value in walls.items()},
        "traffic": traffic(case, itemsize, times),
        **details,
    }


def passes(case: Any) -> int:
    """Over arrays of B x C that the kernels are made to take."""
    if case.objective.normalize != "class":
        return 5
    return 7 if case.size[1] <= WHOLE_ROWS_UP_TO else 9


def traffic(case: Any, itemsize: int, times: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes, and by the time of ours, and of its graph: GB/s, and their share of what add and copy move."""
    size = math.prod(case.size) * itemsize
    limits = {"add": 3 * size / np.median(times["add"]), "copy": 2 * size / np.median(times["copy"])}
    found = {name: {"gb_per_s": report.rounded(speed / 1e9)} for name, speed in limits.items()}
    for kind, count in (("minimum", MINIMUM), ("designed", passes(case))):
        for name in ("ours", "ours graph"):
            if name in times:
                speed = count * size / np.median(times[name])
                shares = {f"of_{limit}": report.rounded(speed / most) for limit, most in limits.items()}
                entry = {"bytes": count * size, "gb_per_s": report.rounded(speed / 1e9), **shares}
                found[f"{kind}{name.removeprefix('ours')}"] = entry
    found["input"] = {"bytes": size}
    return found


# -- goals


def goals(records: list[Record]) -> list[dict[str, str]]:
    judged = []
    for dtype in dict.fromkeys(found["dtype"] for found in records):
        judged += of_dtype(dtype, [found for found in records if found["dtype"] == dtype])
    return [{name: text for name, text in goal.items() if name != "at the bound"} for goal in judged]


def of_dtype(dtype: str, records: list[Record]) -> Iterable[dict[str, str]]:
    cases = [found for found in records if found["goal"]]
    plain = [found for found in records if not found["goal"]]
    for who, least, mean in (("compile careful", 2.5, 3.5), ("eager careful", 5.5, 8)):
        timed = [found for found in cases if not math.isnan(ratio(found, who))]
        name = f"{dtype}, {who}"
        if len(timed) < len(cases):
            name += f" ({len(timed)} of {len(cases)} shapes)"
        yield at_least(f"{name}, every shape", timed, lambda r, who=who: ratio(r, who), lambda r, least=least: least)
        yield mean_of_shapes(name, timed, who, mean)
    large = [found for found in cases if found["traffic"]["input"]["bytes"] >= LARGE_BYTES]
    name = f"{dtype}, designed traffic / copy, from 300 MB"
    yield at_least(name, large, lambda r: r["traffic"]["designed"]["of_copy"], lambda r: 0.85)
    if dtype == "bfloat16":
        at = [found for found in cases if found["shape"] == "4096x1000"]
        yield at_most(f"{dtype}, graph replay, us", at, lambda r: 1e3 * ratio(r, "ours graph", "ms"), 25)
    wide = [found for found in records if elements(found) >= MEMORY_FROM]
    name = f"{dtype}, peak memory / gradient, from 4M elements"
    yield at_most(name, wide, lambda r: r["peak_gradients"]["ours"], 1.05)
    yield at_least(f"{dtype}, plain KD: the best other", plain, best_other, lambda r: 1)


def best_other(found: Record) -> float:
    """Not against whoever did not run: NaN only if nobody did."""
    values = [ratio(found, name) for name in ("compile careful", "compile analytic", "eager liger")]
    return min((value for value in values if not math.isnan(value)), default=math.nan)


# -- tables


def tables(about: dict[str, Any], records: list[Record]) -> str:
    parts = [f"# The losses, forward and backward, on {about['gpu']}", line(about)]
    if about["selection"]["quick"]:
        parts.append("**A quick run: not a table to quote.**")
    if about["goals"]:
        parts += ["## Goals", table(about["goals"][0], (goal.values() for goal in about["goals"]))]
    for title, name in (("DKD by class, with cross-entropy", True), ("KD without normalisation", False)):
        if chosen := [found for found in records if found["goal"] is name]:
            parts += [f"## {title}: time / ours", ratios_table(chosen)]
            parts += ["Traffic by the time of ours, and the kernels and memory of a call:", traffic_table(chosen)]
    if small := [found for found in records if found["wall_us"]]:
        parts += ["## Small shapes: us", small_table(small)]
    notes = [f"{found['case']} {found['shape']}: {note}" for found in records for note in found["notes"]]
    notes += [f"{case}: {why}" for case, why in about["skipped"].items()]
    parts += ["## Left out", "\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def ratios_table(records: list[Record]) -> str:
    names = [name for name in RATIOS if any(not math.isnan(ratio(found, name)) for found in records)]
    rows = [[*where(r), us(r, "ours"), *(number(ratio(r, name)) for name in names), noise(r)] for r in records]
    means = [number(geometric([v for r in records if not math.isnan(v := ratio(r, name))])) for name in names]
    head = ("shape", "dtype", "ours us", *names, "ours again, 20-80 %")
    return table(head, [*rows, ["geometric mean", "", "", *means, ""]])


def traffic_table(records: list[Record]) -> str:
    rows = []
    for found in records:
        speeds = [number(found["traffic"][limit]["gb_per_s"]) for limit in ("add", "copy")]
        shares = [share(found["traffic"][kind]) for kind in ("minimum", "designed")]
        counts = [found["launches"]["ours"], number(found["peak_gradients"]["ours"])]
        rows.append([*where(found), *speeds, *shares, *counts])
    head = ("minimum GB/s (% of add, copy)", "designed GB/s (% of add, copy)", "kernels", "peak / gradient")
    return table(("shape", "dtype", "add GB/s", "copy GB/s", *head), rows)


def small_table(records: list[Record]) -> str:
    rows = []
    for found in records:
        reduced = next((name for name in GRAPHS if name in found["ms"]), "")
        others = [name for name in found["wall_us"] if name.startswith("compile")]
        fastest = min(others, key=found["wall_us"].__getitem__, default="")
        walls = [number(found["wall_us"].get(name, math.nan)) for name in ("ours", fastest)]
        graph = share(found["traffic"]["designed graph"]) if "designed graph" in found["traffic"] else "-"
        rows.append([found["case"], *where(found), us(found, "ours graph"), graph, us(found, reduced), *walls])
    head = ("graph replay", "its designed GB/s (% of add, copy)", "reduce-overhead", "eager wall", "compiled wall")
    return table(("case", "shape", "dtype", *head), rows)


def where(found: Record) -> tuple[str, str]:
    return found["shape"], found["dtype"]


def us(found: Record, name: str) -> str:
    return number(1e3 * found["ms"][name]["median"]) if name in found["ms"] else "-"


def share(speed: dict[str, float]) -> str:
    return f"{number(speed['gb_per_s'])} ({100 * speed['of_add']:.0f}, {100 * speed['of_copy']:.0f})"


def noise(found: Record) -> str:
    return report.band(found["ratios"]["ours again"])


# -- the machine


def machine(args: argparse.Namespace) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    memory, sms = report.rounded(gpu.total_memory / 2**30), gpu.multi_processor_count
    return report.machine(args, "cuda") | {"cuda": torch.version.cuda, "gpu_gib": memory, "multiprocessors": sms}


def line(about: dict[str, Any]) -> str:
    return (
        f"{about['gpu']}, {about['gpu_gib']} GiB, {about['multiprocessors']} multiprocessors, CUDA {about['cuda']}, "
        f"kdcore {about['kdcore']}, torch {about['torch']}, commit {about['commit']} + {about['modified_files']} "
        f"files, {about['date']}"
    )


def progress(found: Record) -> str:
    shown = [f"{name} {number(value)}" for name in RATIOS if not math.isnan(value := ratio(found, name))]
    notes = "".join(f"; {note}" for note in found["notes"])
    return f"{found['case']} {found['shape']}: ours {us(found, 'ours')} us; {', '.join(shown)}{notes}"
