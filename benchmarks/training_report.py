"""From the samples of bench_training.py to its records, tables and the verdict on each goal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from losses_report import number, spread, table

Record = dict[str, Any]
AGAINST = (
    "published", "torchdistill", "ten lines", "ten lines, compiled", "ten lines, compiled, kept memory",
    "ten lines, student alone", "live",
)  # fmt: skip
SEVERAL = "live x "  # students
RATIOS = {  # of speeds: a way, another, the least
    "cpu": (
        ("live", "published", 3.2),
        ("live", "ten lines", 1.2),
        ("cached", "published", 8.0),
        ("cached", "ten lines, student alone", 1.15),
    ),
    "cuda": (("live", "published", 6.0),),
}
EPOCH: Record = {
    "teacher": "cifar_resnet56",
    "student": "cifar_resnet20",
    "batch": 128,
    "images": 50_000,
    "seconds": 2.0,
}
"""Of a cached teacher's student on a GPU: the goal that has models and a batch of its own."""


def record(batch: int, seconds: dict[str, list[float]], costs: dict[str, Record], out: dict[str, str]) -> Record:
    """Images a second, ratios of speeds round by round, costs, and students under one teacher.

    Args:
        batch: images a step.
        seconds: of a step in each round, by way.
        costs: what each way cost besides.
        out: ways that ended before, and why.
    """
    ratios = {
        of: {
            name: spread([b / a for a, b in zip(values, seconds[of], strict=True)]) for name, values in seconds.items()
        }
        for of in AGAINST
        if of in seconds
    }
    return {
        "batch": batch,
        "rounds": len(next(iter(seconds.values()), ())),
        "left_out": out,
        "images_per_second": {name: spread([batch / value for value in values]) for name, values in seconds.items()},
        "ratios": ratios,
        "costs": costs,
        "students": students(batch, seconds, costs),
    }


def students(batch: int, seconds: dict[str, list[float]], costs: dict[str, Record]) -> list[Record]:
    """What k students under one teacher cost, against k runs of one, and the most that sharing its passes can save."""
    several = {int(n.removeprefix(SEVERAL)): values for n, values in seconds.items() if n.startswith(SEVERAL)}
    if not several or "live" not in seconds:
        return []
    return [
        {
            "students": k,
            "step_ms": spread([value * 1e3 for value in values]),
            "student_image_us": spread([value * 1e6 / batch / k for value in values]),
            "most": k / (k - (k - 1) * costs["live"]["parts"]["teacher"]),
            "runs_over_together": spread([k * one / value for one, value in zip(seconds["live"], values, strict=True)]),
        }
        for k, values in sorted({1: seconds["live"], **several}.items())
    ]


# -- goals


def goals(found: Record, about: Record) -> list[Record]:
    """Of this batch: what, least or most, the limit, the figure, and "met", "missed" or "not measured"."""
    if about["device"] == "cuda" and is_epoch(found, about):
        return [epoch(found)]
    if found["batch"] != about["goals_at"]:
        return []
    rows = [
        verdict(f"{way} / {of}", "least", least, found["ratios"].get(of, {}).get(way, {}).get("median"))
        for way, of, least in RATIOS[about["device"]]
    ]
    if about["device"] == "cuda":
        return [*rows, *shares(found["costs"].get("live")), epoch(None)]
    gain = next((row["runs_over_together"]["median"] for row in found["students"] if row["students"] == 3), None)
    return [*rows, verdict("three students under one teacher / three runs", "least", 1.8, gain)]


def shares(live: Record | None) -> list[Record]:
    """The goals on a GPU that are shares of a step."""
    loss, busy = (None, None) if live is None else (live["parts"]["loss"], live["busy"])
    return [
        verdict("loss, share of a live step", "most", 0.03, loss),
        verdict("GPU busy, share of a live step", "least", 0.95, busy),
    ]


def is_epoch(found: Record, about: Record) -> bool:
    """Whether this is what the goal of an epoch is measured by."""
    return {**EPOCH, **{key: about[key] for key in ("teacher", "student")}, "batch": found["batch"]} == EPOCH


def epoch(found: Record | None) -> Record:
    """Seconds for all training images, without evaluation."""
    rate = None if found is None else found["images_per_second"].get("cached")
    what = f"{EPOCH['student']}'s epoch on CIFAR-100, cached, batch {EPOCH['batch']}, seconds"
    return verdict(what, "most", EPOCH["seconds"], EPOCH["images"] / rate["median"] if rate else None)


def verdict(what: str, kind: str, limit: float, figure: float | None) -> Record:
    if figure is None:
        word = "not measured"
    else:
        word = "met" if (figure >= limit if kind == "least" else figure <= limit) else "missed"
    return {"goal": what, "kind": kind, "limit": limit, "figure": figure, "verdict": word}


# -- the page


def page(about: Record, records: Sequence[Record]) -> str:
    parts = [f"# Training: {about['teacher']} -> {about['student']}", line(about), f"    {about['command']}"]
    parts += [f"Left out: {name} ({why})." for name, why in about["left_out"].items()]
    for found in records:
        parts += [f"## Batch {found['batch']}, {found['rounds']} rounds", rates_table(found), *filling(found)]
        parts += [f"Left out: {name} ({why})." for name, why in found["left_out"].items()]
        if rows := goals(found, about):
            parts += ["### Goals", goals_table(rows)]
        if found["students"]:
            parts += ["### Students under one teacher", students_table(found)]
        parts += ["### Where the time goes", *parts_table(found), shares_table(found)]
    return "\n\n".join(parts) + "\n"


def line(about: Record) -> str:
    place = about["gpu"] or f"{about['processor']}, {about['threads']} threads on cores {about['cores']}"
    others = f", torchdistill {about['torchdistill']}" if about["torchdistill"] else ""
    return (
        f"{place}; torch {about['torch']}, Python {about['python']}, kdcore {about['kdcore']}{others}, "
        f"commit {about['commit']} + {about['modified_files']} files, {about['date']}. kdcore and the ten lines in "
        f"{about['precision']}. Each way once a round in random "
        f"order; median (20th to 80th percentile) over rounds. The machine's load before: {about['load']}."
    )


def rates_table(found: Record) -> str:
    gpu = any("busy" in cost for cost in found["costs"].values())
    head = ["way", "images / s", *(f"/ {name}" for name in found["ratios"]), "peak MiB", *(["GPU busy"] if gpu else [])]
    rows = []
    for name, rate in found["images_per_second"].items():
        cost = found["costs"][name]
        ratios = [number(found["ratios"][of][name]["median"]) for of in found["ratios"]]
        rows.append([name, band(rate), *ratios, number(cost["peak_mb"]), *([f"{cost['busy']:.0%}"] if gpu else [])])
    return table(head, rows)


def filling(found: Record) -> list[str]:
    """What no sample of the cached way has in it."""
    rate = found["costs"].get("cached", {}).get("filling")
    if rate is None:
        return []
    return [
        f"Rates of the cached way leave out filling: {number(rate)} images / s, timed once, so a view of "
        f"{EPOCH['images']:,} images takes {number(EPOCH['images'] / rate)} s."
    ]


def goals_table(rows: Sequence[Record]) -> str:
    figures = ["" if row["figure"] is None else number(row["figure"]) for row in rows]
    shown = [
        [row["goal"], f"at {row['kind']} {row['limit']:g}", figure, row["verdict"]]
        for row, figure in zip(rows, figures, strict=True)
    ]
    return table(("ratio of images a second, or as named", "goal", "measured", ""), shown)


def students_table(found: Record) -> str:
    rows = [
        [
            row["students"],
            *(band(row[key]) for key in ("step_ms", "student_image_us", "runs_over_together")),
            number(row["most"]),
        ]
        for row in found["students"]
    ]
    return table(("students", "ms a step", "us a student and image", "as many runs of one / this", "at most"), rows)


def parts_table(found: Record) -> list[str]:
    shares = {name: cost["parts"] for name, cost in found["costs"].items() if "parts" in cost}
    if not shares:
        return []
    head = next(iter(shares.values()))
    rows = [[name, *(f"{share:.1%}" for share in part.values())] for name, part in shares.items()]
    return [table(("share of a step by part", *head), rows)]


def shares_table(found: Record) -> str:
    rows = []
    for name, cost in found["costs"].items():
        top = list(cost["shares"].items())[:6]
        rows.append([name, ", ".join(f"{share:.0%} {kind}" for kind, share in top)])
    return table(("way", "share of a step by operation"), rows)


def band(values: dict[str, float]) -> str:
    return f"{number(values['median'])} ({number(values['p20'])}-{number(values['p80'])})"
