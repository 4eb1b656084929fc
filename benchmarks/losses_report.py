"""From the samples of bench_losses.py to its records, tables and the verdict on each goal."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kdcore

ROOT = Path(__file__).resolve().parent.parent

# The roofline's model of class-normalised DKD in float32 at AVX-512. Cycles of the busier floating-point port per 16
# elements of both inputs, counted from the instructions of a prototype of these two algorithms and the measured port
# behaviour of Zen 4; passes over an array of B x C that each algorithm makes.
ROWS_UP_TO = 8192  # classes; csrc/cpu/engine.h has the same bound
CYCLES_PER_16 = {"rows": 20, "columns": 33}
PASSES = {"rows": 8, "columns": 5}
FLOOR_PASSES = 5
ROOFLINE_FROM = 256_000  # elements

Record = dict[str, Any]
Measure = Callable[[Record], float]
Better = ("careful A", "careful B")  # the better of these two counts as careful


# -- records


def record(case: Any, measured: dict[str, Any], errors: dict[str, list[float]], bench: Any) -> Record:
    seconds = {name: np.array(values) for name, values in measured.pop("seconds").items()}
    found = {
        "case": case.name,
        "shape": case.shape,
        "goal": case.goal,
        **measured,
        "errors": errors,
        "ms": {name: spread(values * 1e3) for name, values in seconds.items()},
        "ratios": {name: spread(values / seconds["ours"]) for name, values in seconds.items()},
    }
    if "raw" in seconds:
        found["overhead_us"] = spread((seconds["ours"] - seconds["raw"]) * 1e6)
    if case.goal and bench.isa == "avx512":
        found["roofline"], model = roofline(case, seconds, bench.threads, bench.ghz)
        bound = model + seconds["autograd alone"]
        found["bound_ms"] = spread(bound * 1e3)
        found["ratios_at_bound"] = {name: spread(values / bound) for name, values in seconds.items()}
    return found


def roofline(case: Any, seconds: dict[str, Any], threads: int, ghz: float) -> tuple[dict[str, Any], Any]:
    """The time in which the algorithm's arithmetic and its memory passes would be done one after the other."""
    rows, classes = case.size
    algorithm = "rows" if classes <= ROWS_UP_TO else "columns"
    port = CYCLES_PER_16[algorithm] * rows * classes / 16 / (threads * ghz * 1e9)
    floor = np.minimum(seconds["floor plain"], seconds["floor streaming"])
    model = port + floor * (PASSES[algorithm] / FLOOR_PASSES)
    shares = {
        "algorithm": algorithm,
        "port_ms": rounded(port * 1e3),
        "floor_ms": spread(floor * 1e3),
        "model_ms": spread(model * 1e3),
        "model_over_raw": spread(model / seconds["raw"]),
        "model_over_ours": spread(model / seconds["ours"]),
        "floor_over_raw": spread(floor / seconds["raw"]),
    }
    return shares, model


def spread(values: Any) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.2, 0.5, 0.8])
    return {"median": rounded(median), "p20": rounded(low), "p80": rounded(high)}


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def ratio(found: Record, name: str, of: str = "ratios") -> float:
    """Time over ours, or another median; "careful" is the better of its two versions. NaN if it was not timed."""
    how, _, which = name.partition(" ")
    names = [f"{how} {version}" for version in Better] if which == "careful" else [name]
    medians = found.get(of, {})
    return min((medians[n]["median"] for n in names if n in medians), default=math.nan)


def at_bound(found: Record, name: str) -> float:
    return ratio(found, name, "ratios_at_bound")


def milliseconds(found: Record, name: str) -> float:
    return ratio(found, name, "ms")


def geometric(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if values else math.nan


# -- goals


def goals(records: list[Record], isa: str | None) -> list[dict[str, str]]:
    cases = [found for found in records if found["goal"]]
    plain_kd = [found for found in records if found["case"] == "KD none float32"]
    small = [found for found in cases if elements(found) < 1_000_000]
    slow = {"64x10": 2.5, "64x128256": 2.5}
    with_model = [found for found in cases if "roofline" in found and elements(found) >= ROOFLINE_FROM]
    return [
        every_shape("compiled careful code", cases, "compile careful", lambda r: 4.5),
        mean_of_shapes("compiled careful code", cases, "compile careful", 7),
        every_shape("compiled analytic graph", cases, "compile analytic", lambda r: slow.get(r["shape"], 3)),
        mean_of_shapes("compiled analytic graph", cases, "compile analytic", 4.5),
        mean_of_shapes("eager careful code", cases, "eager careful", 12),
        mean_of_shapes("eager textbook code", cases, "eager textbook", 30),
        at_most("CE in the call / without", cases, lambda r: ratio(r, "ours + CE"), 1.25),
        at_most("bfloat16 / float32", cases, lambda r: ratio(r, "ours bfloat16"), 1),
        at_most("AVX2 / AVX-512", cases if isa == "avx512" else [], lambda r: ratio(r, "ours avx2"), 2),
        at_most("ours - raw below 1M elements, us", small, overhead, 30),
        at_least(
            "roofline: (port bound + floor of own passes) / raw time, from 256k elements",
            with_model,
            lambda r: r["roofline"]["model_over_raw"]["median"],
            lambda r: 0.65,
        ),
        at_least(
            "KD without normalisation against the best compiled code, every shape",
            plain_kd,
            lambda r: min(ratio(r, "compile careful"), ratio(r, "compile analytic")),
            lambda r: 1,
        ),
    ]


def elements(found: Record) -> int:
    return math.prod(map(int, found["shape"].split("x")))


def overhead(found: Record) -> float:
    """Microseconds; above 1M elements it is the caches' mood, of either sign."""
    return float(found.get("overhead_us", {}).get("median", math.nan))


def every_shape(name: str, cases: list[Record], against: str, bound: Measure) -> dict[str, str]:
    found = at_least(f"{name}, every shape", cases, lambda r: ratio(r, against), bound)
    at_best = at_least("", cases, lambda r: at_bound(r, against), bound)
    return found | {"at the bound": at_best["measured"]}


def mean_of_shapes(name: str, cases: list[Record], against: str, wanted: float) -> dict[str, str]:
    mean, at_best = (geometric([of(found, against) for found in cases]) for of in (ratio, at_bound))
    shown = "not measured" if math.isnan(mean) else f"{mean:.2f} over {len(cases)} shapes"
    met = None if math.isnan(mean) else mean >= wanted
    best = "" if math.isnan(at_best) else f"{at_best:.2f}"
    return verdict(f"{name}, geometric mean", f">= {wanted:g}", shown, met) | {"at the bound": best}


def at_least(name: str, cases: list[Record], value: Measure, bound: Measure) -> dict[str, str]:
    """Judged, and shown, at the shape that is nearest to its bound."""
    if not cases or any(math.isnan(value(found)) for found in cases):
        return verdict(name, "-", "not measured", None)
    worst = min(cases, key=lambda found: value(found) / bound(found))
    bounds = sorted({bound(found) for found in cases}, reverse=True)
    wanted = ">= " + " / ".join(f"{b:g}" for b in bounds)
    return verdict(name, wanted, f"{value(worst):.2f} at {worst['shape']}", value(worst) >= bound(worst))


def at_most(name: str, cases: list[Record], value: Measure, bound: float) -> dict[str, str]:
    if not cases or any(math.isnan(value(found)) for found in cases):
        return verdict(name, f"<= {bound:g}", "not measured", None)
    worst = max(cases, key=value)
    return verdict(name, f"<= {bound:g}", f"{value(worst):.3g} at {worst['shape']}", value(worst) <= bound)


def verdict(name: str, wanted: str, measured: str, met: bool | None) -> dict[str, str]:
    answer = {True: "met", False: "missed", None: "-"}[met]
    return {"goal": name, "wanted": wanted, "measured": measured, "verdict": answer, "at the bound": ""}


# -- tables

RIVALS = (
    *("eager textbook", "eager careful"),
    *("compile textbook", "compile careful", "compile analytic"),
)


def tables(about: dict[str, Any], records: list[Record]) -> str:
    cases, others = ([r for r in records if r["goal"] is goal] for goal in (True, False))
    parts = [f"# The losses, forward and backward, on {about['processor']}", line(about)]
    if about["isa"] is None:
        parts.append("**Timed without the compiled op: these are figures of the reference, not of kdcore.**")
    kept, disturbed = (sum(found[key] for found in records) for key in ("rounds", "disturbed"))
    if disturbed > 0.1 * kept:
        parts.append(f"**Other processes disturbed {disturbed} of {kept} rounds: not a table to quote.**")
    if about["selection"]["quick"]:
        parts.append("**A quick run: not a table to quote.**")
    if about["goals"]:
        parts += ["## Goals", table(about["goals"][0], (g.values() for g in about["goals"]))]
    if cases:
        parts += ["## Float32, class-normalised DKD: ms", times_table(cases)]
        parts += ["## The same: time / ours (median of per-round ratios)", ratios_table(cases)]
        parts += ["## Variants of ours: time / ours", variants_table(cases)]
    if any("bound_ms" in found for found in cases):
        parts += ['## The bound (README.md, "The model"): time / bound', bound_table(cases)]
    if any("roofline" in found for found in cases):
        parts += ['## Roofline (README.md, "The model")', roofline_table(cases)]
    if others:
        parts += ["## Other cases", others_table(others)]
    return "\n\n".join(parts) + "\n"


def times_table(cases: list[Record]) -> str:
    names = (*RIVALS, "ours", "raw")
    rows = [
        [r["shape"], *(number(milliseconds(r, n)) for n in names), r["rounds"], r["dropped"], r["disturbed"]]
        for r in cases
    ]
    return table(("shape", *names, "rounds", "repeated", "disturbed"), rows)


def ratios_table(cases: list[Record]) -> str:
    rows = [[r["shape"], *(number(ratio(r, n)) for n in RIVALS), band(r["ratios"]["ours again"])] for r in cases]
    means = [number(geometric([ratio(r, n) for r in cases])) for n in RIVALS]
    return table(("shape", *RIVALS, "ours again, 20-80 %"), [*rows, ["geometric mean", *means, ""]])


def variants_table(cases: list[Record]) -> str:
    names = [n for n in cases[0]["ratios"] if n.startswith("ours ") and n != "ours again"]
    rows = [
        [
            r["shape"],
            *(number(ratio(r, n)) for n in names),
            number(overhead(r)),
        ]
        for r in cases
    ]
    return table(("shape", *names, "ours - raw, us"), rows)


def bound_table(cases: list[Record]) -> str:
    rows = [
        [
            r["shape"],
            number(milliseconds(r, "ours")),
            number(r["bound_ms"]["median"]),
            number(milliseconds(r, "autograd alone")),
            *(number(at_bound(r, n)) for n in RIVALS),
        ]
        for r in cases
        if "bound_ms" in r
    ]
    return table(("shape", "ours ms", "bound ms", "of it autograd ms", *RIVALS), rows)


def roofline_table(cases: list[Record]) -> str:
    rows = []
    for r in cases:
        if found := r.get("roofline"):
            medians = [found[n]["median"] for n in ("floor_ms", "model_ms")]
            shares = [band(found[n]) for n in ("model_over_raw", "model_over_ours", "floor_over_raw")]
            rows.append([r["shape"], found["algorithm"], number(found["port_ms"]), *map(number, medians), *shares])
    head = ("port bound ms", "floor ms, 5 passes", "model ms", "model / raw", "model / ours", "floor / raw")
    return table(("shape", "algorithm", *head), rows)


def others_table(others: list[Record]) -> str:
    names = [n for n in RIVALS if any(not math.isnan(ratio(r, n)) for r in others)]
    rows = []
    for r in others:
        times = [number(milliseconds(r, n)) for n in ("ours", "raw")]
        rows.append([r["case"], r["shape"], *times, *(number(ratio(r, n)) for n in names)])
    return table(("case", "shape", "ours ms", "raw ms", *(f"{n} / ours" for n in names)), rows)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def band(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['p20']:.2f}-{values['p80']:.2f})"


# -- the machine and the files


def machine(args: argparse.Namespace, isa: str | None, ghz: float = 0.0) -> dict[str, Any]:
    cuda = torch.cuda.get_device_name(0) if args.device == "cuda" else None
    return {
        "processor": processor(),
        "gpu": cuda,
        "device": args.device,
        "cores": sorted(os.sched_getaffinity(0)),
        "cores_of_machine": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock_ghz": rounded(ghz),
        "isa": isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "allocator": {name: os.environ.get(name) for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")},
        "kdcore": kdcore.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "modified_files": len(
            git("status", "--porcelain", "--", "kdcore", "csrc", "setup.py", "benchmarks").splitlines()
        ),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "selection": {name: getattr(args, name) for name in ("shapes", "dtypes", "modes", "full", "quick")},
    }


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    found = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.M) for key in ("model name", "cpu family", "model")}
    name, family, model = (match.group(1).strip() if match else "?" for match in found.values())
    brand = re.sub(r"\(R\)|\(TM\)| @.*| CPU| Processor", "", name)
    return f"{brand} (family {family}, model {model})"


def git(*command: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True).stdout.strip()


def line(about: dict[str, Any]) -> str:
    tuned = "allocator tuned" if about["allocator"]["MALLOC_MMAP_MAX_"] else "default allocator"
    return (
        f"{about['processor']}, {about['threads']} threads on cores {about['cores']}, "
        f"{about['clock_ghz']} GHz, kdcore {about['kdcore']} ({about['isa']}), torch {about['torch']} "
        f"({about['torch_isa']}), {tuned}, commit {about['commit']} + {about['modified_files']} files, {about['date']}"
    )


def progress(found: Record, seconds: float) -> str:
    names = (*RIVALS, *(n for n in found["ratios"] if n.startswith("ours ")))
    shown = [f"{n} {number(ratio(found, n))}" for n in names if not math.isnan(ratio(found, n))]
    rounds = f"{found['rounds']} rounds, {found['dropped']} repeated, {found['disturbed']} disturbed"
    ours = number(milliseconds(found, "ours"))
    return f"{seconds:5.0f} s  {found['case']} {found['shape']}: ours {ours} ms; {', '.join(shown)}; {rounds}"


def write(args: argparse.Namespace, about: dict[str, Any], records: list[Record], text: str) -> None:
    """Only a whole run of the compiled op goes to results/ unasked: a part must not replace it."""
    print("\n" + text)
    folder = args.out or (ROOT / "benchmarks" / "results" if args.whole and about["isa"] else None)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", (about["gpu"] or about["processor"]).lower()).strip("-")
    kinds = [name for name in ("full", "default_allocator") if getattr(args, name)]
    stem = "-".join(["losses", args.device, slug, *kinds]).replace("_", "-")
    (folder / f"{stem}.md").write_text(text)
    (folder / f"{stem}.json").write_text(json.dumps({"about": about, "records": records}, indent=1) + "\n")
    print(f"wrote {stem}.md and .json")
