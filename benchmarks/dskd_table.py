"""The page of the table of DSKD, made of its JSON alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dskd_claims import claims
from dskd_figures import (
    DSKD,
    KD,
    PUBLISHED,
    Spread,
    accuracy,
    columns,
    flops,
    gain,
    on_labels,
    stops,
    unit,
    variants,
)

Table = Mapping[str, Any]

TITLE = "# Table 1 of Si et al. 2025 on {data}: chains of assistants with and without dynamic stop"
PARTS = {
    "main": "all chains, KD and DSKD",
    "alpha": "the same with alpha = 0.9",
    "k": "the patience K, DSKD alone",
    "strong": "a stronger teacher",
    "long": "longer training",
    "greedy": "greedy search",
}
GOAL_OVERHEAD = 1.25


def page(content: Table) -> str:
    """The whole page, as Markdown."""
    runs = [run for part in content["parts"].values() for run in part]
    sections = [_head(content, runs), _missing(content), _reproduces(content), _accuracies(content), _claims(content)]
    return "\n".join(text for text in (*sections, *_details(content)) if text)


# ---------------------------------------------------------------- cells


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell for cell in line)} |\n" for line in lines)


def plus_minus(found: Spread | None) -> str:
    """97.41 ± 0.12; of one value without a spread."""
    return "" if found is None else f"{found.mean:.2f}" + ("" if found.sd is None else f" ± {found.sd:.2f}")


def interval(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:+.2f}" + ("" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]")


def alpha(run: Table) -> str:
    """The weight of cross-entropy."""
    return f"{run['protocol']['objective'][0]['weight']:g}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


# ---------------------------------------------------------------- sections


def _head(content: Table, runs: Sequence[Table]) -> str:
    if not runs:
        return f"{TITLE.format(data=content['data'])}\n\nNothing has run yet.\n"
    first = runs[0]
    where, versions, jobs = first["environment"], first["versions"], sorted({run["jobs"] for run in runs})
    rows = [
        (run["name"], PARTS[part], f"`{run['tag']}`", str(len(run["protocol"]["seeds"])),
         str(run["protocol"]["train"]["epochs"]), str(run["starts"]["stages"]), minutes(run["wall_seconds"]),
         run["finished"][:10])
        for part, found in content["parts"].items() for run in found
    ]  # fmt: skip
    heads = ("run", "what", "protocol", "seeds", "epochs", "stages trained by it", "wall-clock, minutes", "finished")
    return (
        f"{TITLE.format(data=content['data'])}\n\n"
        f"{where['processor']} ({where['machine']}), {where['device']}, {where['threads']} thread(s) a stage, "
        f"{', '.join(map(str, jobs))} stages at once; kdcore {versions['kdcore']}, torch {versions['torch']}, Python "
        f"{versions['python']}. Figures are test accuracies in percent after the last epoch unless something else is "
        "said, means and standard deviations over seeds.\n\n"
        f"```sh\n{chr(10).join(content['commands'])}\n```\n\n{table(heads, rows)}\n"
        f"The protocol `{first['tag']}`: {_protocol(first)} The others differ from it as their parts say.\n"
    )


def _protocol(run: Table) -> str:
    about = run["protocol"]
    images, train, data = about["images"], about["train"], about["data"]
    terms = ", ".join(f"{term['weight']:g} x {term['loss']}" + _extra(term) for term in about["objective"])
    stop = ", ".join(f"{c['name']} ({_options(c)})" for c in about["controller"])
    return (
        f"{data['name']}, {images['train']} training and {images['monitor']} monitor images (split seed "
        f"{data['split_seed']}), {images['test']} test images that decide nothing; {' - '.join(about['models'])}; "
        f"{train['epochs']} epochs, batch {data['batch_size']}, {train['optimizer']['name']} with lr {train['lr']:g} "
        f"and {train['schedule']['name']} schedule; weights of the {about['selection']} epoch; objective {terms}; "
        f"{stop}; seeds {', '.join(map(str, about['seeds']))}."
    )


def _extra(term: Table) -> str:
    return f" at temperature {term['temperature']:g}" if "temperature" in term else ""


def _options(controller: Table) -> str:
    return ", ".join(f"{key} {value}" for key, value in controller.items() if key != "name")


def _missing(content: Table) -> str:
    missing = [f"{name} ({PARTS[name.partition(':')[0]]})" for name in content["missing"]]
    return f"\nNot run, or not finished: {', '.join(missing)}.\n" if missing else ""


def _reproduces(content: Table) -> str:
    run = unit(content, "main")
    if run is None:
        return ""
    models = run["protocol"]["models"]
    teacher, student = on_labels(run, models[0], "teacher"), on_labels(run, models[-1], "control")
    direct, texts = columns(run)[0], [_teacher_text(run, models, teacher, student)]
    ours, theirs = accuracy(run, direct, KD), PUBLISHED.get(content["data"], {}).get(KD)
    if ours and theirs:
        texts.append(f"KD on {direct} reaches {plus_minus(ours)}, the paper {theirs[0]:.2f}.")
    gains = [found for found in (gain(run, chain) for chain in columns(run)) if found]
    clear = [found for found in gains if found.low is not None and (found.low > 0 or found.high < 0)]
    texts.append(
        f"Of {len(gains)} chains the dynamic stop changes {len(clear)} by more than their 95 % interval; the lowest "
        f"DSKD mean is {min(found.mean for found in _every(run, DSKD)):.2f}: "
        + ("a chain collapses as in the paper." if min(g.mean for g in gains) <= -5 else "nothing collapses.")
    )
    if (strong := unit(content, "strong")) is not None:
        models = strong["protocol"]["models"]
        texts.append(f"Beside it, {_teacher_text(strong, models, on_labels(strong, models[0], 'teacher'), student)}")
    warned = [text for text in run["warnings"] if "not above the label-only control" in text]
    if warned:
        texts.append(f"Preflight warned {len(warned)} time(s), first of `{warned[0]}`.")
    return f"\n## What reproduces\n\n{' '.join(texts)}\n"


def _every(run: Table, variant: str) -> list[Spread]:
    return [found for found in (accuracy(run, chain, variant) for chain in columns(run)) if found]


def _teacher_text(run: Table, models: Sequence[str], teacher: Spread | None, student: Spread | None) -> str:
    if teacher is None or student is None:
        return "The teacher or the control was not measured."
    how = "weaker than" if teacher.mean < student.mean else "stronger than"
    return (
        f"the teacher {models[0]} has {plus_minus(teacher)}, the student {models[-1]} on labels alone "
        f"{plus_minus(student)}: the teacher is {how} its student by {abs(teacher.mean - student.mean):.2f} points."
    )


def _accuracies(content: Table) -> str:
    found = [unit(content, part) for part in ("main", "alpha")]
    runs = [run for run in found if run is not None]
    if not runs:
        return ""
    rows: list[list[str]] = []
    for variant in (KD, DSKD):
        rows += [_published(content["data"], variant)] if content["data"] in PUBLISHED else []
        rows += [_row(run, variant, f"{variant}, alpha {alpha(run)}") for run in runs]
    rows += [_gains(run, f"DSKD - KD, alpha {alpha(run)}") for run in runs]
    rows += [
        _row(run, v, f"{v}, alpha {alpha(run)}, best on monitor", "test_at_best") for run in runs for v in (KD, DSKD)
    ]
    text = "Differences are paired over seeds, in points, with 95 % intervals by Student's t.\n\n"
    return f"\n## Chains\n\n{text}{table(['', *columns(runs[0])], rows)}\n{_on_labels(runs[0])}"


def _published(data: str, variant: str) -> list[str]:
    return [f"{variant}, published", *(f"{value:.2f}" for value in PUBLISHED[data][variant]), "-"]


def _row(run: Table, variant: str, name: str, measure: str = "test") -> list[str]:
    return [name, *(plus_minus(accuracy(run, chain, variant, measure)) for chain in columns(run))]


def _gains(run: Table, name: str) -> list[str]:
    return [name, *(interval(gain(run, chain)) for chain in columns(run))]


def _on_labels(run: Table) -> str:
    roles = [(row["role"], row["model"]) for row in run["labels"]]
    texts = [f"{model} {plus_minus(on_labels(run, model, role))} ({role})" for role, model in dict.fromkeys(roles)]
    return f"On labels alone: {', '.join(texts)}.\n"


def _claims(content: Table) -> str:
    rows = [
        (f"({claim.number}) {claim.text}", claim.table, setting, measured, f"**{verdict}**", claim.rule)
        for claim in claims(content)
        for setting, measured, verdict in claim.findings
    ]
    heads = ("claim", "the paper's own table", "where", "measured here", "verdict", "held if")
    return f"\n## The paper's claims\n\n{table(heads, rows)}"


def _details(content: Table) -> Iterator[str]:
    """A section a part; those that did not run have none."""
    sections: dict[str, Callable[[Table], str]] = {"main": _stops, "alpha": _stops, "strong": _chains, "long": _chains}
    for part, section in sections.items():
        if (run := unit(content, part)) is not None:
            yield f"\n## {run['name'].capitalize()}: {PARTS[part]}\n\n{section(run)}"
    if content["parts"].get("k"):
        yield f"\n## {PARTS['k'].capitalize()}\n\n{_patience(content['parts']['k'])}"
    if (run := unit(content, "greedy")) is not None:
        yield f"\n## Greedy search\n\n{_greedy(run)}"
    if runs := [run for part in content["parts"].values() for run in part]:
        yield f"\n## Costs\n\n{_costs(runs)}"


def _chains(run: Table) -> str:
    rows = [_row(run, variant, variant) for variant in variants(run)]
    rows += [_gains(run, "DSKD - KD")] if len(rows) == 2 else []
    return f"{table(['', *columns(run)], rows)}\n{_on_labels(run)}\n{_stops(run)}"


def _stops(run: Table) -> str:
    found = stops(run)
    if not found:
        return ""
    seeds = [f"seed {seed}" for seed in run["protocol"]["seeds"]]
    rows = [
        (stop.chain, *("never" if stop.by_seed.get(seed) is None else str(stop.by_seed[seed])
                       for seed in run["protocol"]["seeds"]), f"{stop.share:.0%}")
        for stop in found
    ]  # fmt: skip
    text = f"The epoch, of {found[0].epochs}, after which the last model of a chain went on with labels alone:\n\n"
    return text + table(("stage", *seeds, "mean share of epochs with KD"), rows)


def _patience(runs: Sequence[Table]) -> str:
    rows = []
    for run in runs:
        share = statistics.fmean(stop.share for stop in stops(run))
        work = f"{flops(run['chains']) / 1e12:.2f}"
        rows.append([*_row(run, DSKD, run["name"]), f"{share:.0%}", work])
    heads = ["", *columns(runs[0]), "mean share of epochs with KD", "TFLOPs of distilled stages"]
    return table(heads, rows)


def _greedy(run: Table) -> str:
    ratio = run["costs"]["overhead"]
    rows = [
        (choice["text"], *("" if choice[key] is None else f"{100 * choice[key]:+.2f}" for key in ("margin", "error")),
         "noise" if choice["is_noise"] else "")
        for choice in run["choices"]
    ]  # fmt: skip
    goal = f"goal {GOAL_OVERHEAD}: {'met' if ratio is not None and ratio <= GOAL_OVERHEAD else 'missed'}"
    end = next((row for row in [accuracy(run, run["chosen"], DSKD)] if row), None)
    return (
        f"It chose {run['chosen']} ({plus_minus(end)} on the test images). Its distilled stages and their controls "
        f"take {_ratio(ratio)} times the FLOPs of the same stages without controls and stops ({goal}).\n\n"
        + table(("decision", "margin, points", "standard error", ""), rows)
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _costs(runs: Sequence[Table]) -> str:
    heads = ("run", "stages", "more without sharing", "stopped", "TFLOPs: students", "teachers", "controls",
             "first teachers", "saved by stopping", "saved by sharing", "stage hours",
             "DSKD + controls / KD, FLOPs", "the same, seconds")  # fmt: skip
    return (
        "As if each run were alone: stages that it shares with others count in each. The last two columns are those of "
        "the distilled stages with their controls: FLOPs over the same stages without controls and stops, seconds over "
        f"the same chains under plain KD in the same run.\n\n{table(heads, map(_cost, runs))}"
    )


def _cost(run: Table) -> list[str]:
    costs = run["costs"]
    roles = ("students", "teachers", "controls", "first_teachers", "stopping", "sharing")
    rows = (*run["labels"], *run["chains"])
    return [
        run["name"], str(len({row["key"] for row in rows})), str(costs["stages_shared"]), str(costs["stages_stopped"]),
        *(f"{costs[role]['flops'] / 1e12:.2f}" for role in roles),
        f"{sum({row['key']: row['seconds'] for row in rows}.values()) / 3600:.2f}",
        _ratio(costs["overhead"]), _ratio(costs["clock"]),
    ]  # fmt: skip


def pretty(content: Table) -> str:
    """The JSON as it is committed."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
