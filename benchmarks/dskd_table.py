"""The page of the table of DSKD, and how its JSON is written. The page is made of the JSON alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dskd_claims import COLLAPSE, claims
from dskd_figures import DSKD, KD, PUBLISHED, accuracy, columns, gain, labels_by_seed, on_labels, shown, unit
from dskd_sections import accuracies, chains, costs, gains, goals, greedy, labels, patience, stop_epochs
from tables import Spread, interval, paired, plus_minus, spread, table

Table = Mapping[str, Any]

TITLE = "# Table 1 of Si et al. 2025 on {data}: chains of assistants with and without dynamic stop"
PARTS = {
    "main": "All chains, KD and DSKD",
    "alpha": "The same with alpha = 0.9",
    "k": "The patience K, DSKD alone",
    "strong": "A stronger teacher",
    "long": "Longer training",
    "greedy": "Greedy search",
}
RUN_HEADS = (
    "run",
    "protocol",
    "seeds",
    "epochs",
    "stages that it trained",
    "at once",
    "their minutes",
    "wall-clock, minutes",
    "finished",
)
NEAR = 0.5  # points
WEAK = "not above the label-only control"


def page(content: Table) -> str:
    """The whole page, as Markdown."""
    return "\n".join([*_head(content), *_sections(content)])


# ---------------------------------------------------------------- head


def _head(content: Table) -> Iterator[str]:
    yield f"{TITLE.format(data=shown(content['data']))}\n"
    named = [(part, run) for part, found in content["parts"].items() for run in found]
    if not named:
        yield "Nothing has run yet.\n"
        return
    first = named[0][1]
    yield f"{_where(first)}\n\n```sh\n{chr(10).join(content['commands'])}\n```\n"
    yield table(RUN_HEADS, [_run(part, run) for part, run in named])
    yield f"Protocol `{first['tag']}`: {_protocol(first)} The others differ from it as their names say.\n"
    if content["missing"]:
        yield f"Not run, or not finished: {', '.join(content['missing'])}.\n"


def _where(run: Table) -> str:
    about, versions = run["environment"], run["versions"]
    return (
        f"{about['processor']} ({about['machine']}), {about['device']}, {_threads(about['threads'])} a stage; "
        f"kdcore {versions['kdcore']}, torch {versions['torch']}, Python "
        f"{versions['python']}. Figures are test accuracies in percent after the last epoch unless something else is "
        "said: means and standard deviations over seeds."
    )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _run(part: str, run: Table) -> list[str]:
    about, trained = run["protocol"], run["trained"]
    return [
        PARTS[part] if run["name"] == part else run["name"], f"`{run['tag']}`", str(len(about["seeds"])),
        str(about["train"]["epochs"]), str(trained["stages"]), str(run["jobs"]),
        f"{trained['seconds'] / 60:.1f}", f"{run['wall_seconds'] / 60:.1f}", run["finished"][:10],
    ]  # fmt: skip


def _protocol(run: Table) -> str:
    about = run["protocol"]
    images, train, data = about["images"], about["train"], about["data"]
    terms = ", ".join(f"{term['weight']:g} x {term['loss']}{_temperature(term)}" for term in about["objective"])
    stop = ", ".join(map(_called, about["controller"]))
    return (
        f"{data['name']}, {images['train']} training and {images['monitor']} monitor images (split seed "
        f"{data['split_seed']}), {images['test']} test images that decide nothing; {', '.join(about['models'])}; "
        f"{train['epochs']} epochs, batch {data['batch_size']}, {_called(train['optimizer'])} with lr {train['lr']:g} "
        f"and {train['schedule']['name']} schedule; weights of the {about['selection']} epoch; objective {terms}; "
        f"{stop}; seeds {', '.join(map(str, about['seeds']))}."
    )


def _temperature(term: Table) -> str:
    return f" at temperature {term['temperature']:g}" if "temperature" in term else ""


def _called(named: Table) -> str:
    options = ", ".join(f"{key} {value}" for key, value in named.items() if key != "name")
    return f"{named['name']} ({options})" if options else str(named["name"])


# ---------------------------------------------------------------- sections


def _sections(content: Table) -> Iterator[str]:
    found = {part: unit(content, part) for part in PARTS}
    main = found["main"]
    if main is not None:
        yield f"## What reproduces\n\n{' '.join(_reproduces(content, main))}\n"
        yield f"## {PARTS['main']}\n\n{_paper_table(content['data'], [main, found['alpha']])}\n{labels(main)}"
        yield f"### When KD stops, alpha {_alpha(main)}\n\n{stop_epochs(main)}"
    if found["alpha"] is not None:
        yield f"### When KD stops, alpha {_alpha(found['alpha'])}\n\n{stop_epochs(found['alpha'])}"
    if content["parts"].get("k"):
        yield f"## {PARTS['k']}\n\n{patience(content['parts']['k'])}"
    for part in ("strong", "long"):
        if (run := found[part]) is not None:
            yield f"## {PARTS[part]}\n\n{chains(run)}"
    if found["greedy"] is not None:
        yield f"## {PARTS['greedy']}\n\n{greedy(found['greedy'])}"
    if runs := [run for part in content["parts"].values() for run in part]:
        yield f"## Costs\n\n{costs(runs)}\n{goals(content)}"
    yield f"## The paper's claims\n\n{_claims(content)}"


def _alpha(run: Table) -> str:
    """The weight of cross-entropy."""
    return f"{run['protocol']['objective'][0]['weight']:g}"


def _paper_table(data: str, found: Sequence[Table | None]) -> str:
    runs = [run for run in found if run is not None]
    rows: list[list[str]] = []
    for variant in (KD, DSKD):
        if data in PUBLISHED:
            rows.append([f"{variant}, published", *(f"{value:.2f}" for value in PUBLISHED[data][variant]), "-"])
        rows += [accuracies(run, variant, f"{variant}, alpha {_alpha(run)}") for run in runs]
    rows += [gains(run, f"DSKD - KD, alpha {_alpha(run)}") for run in runs]
    rows += [
        accuracies(run, variant, f"{variant}, alpha {_alpha(run)}, best epoch by the monitor split", "test_at_best")
        for run in runs
        for variant in (KD, DSKD)
    ]  # fmt: skip
    text = "Differences are paired over seeds, in points, with 95 % intervals by Student's t.\n\n"
    return text + table(["", *columns(runs[0])], rows)


def _claims(content: Table) -> str:
    rows = []
    for claim in claims(content):
        about = (f"({claim.number}) {claim.text}", claim.table, claim.rule)
        for where, measured, verdict in claim.findings:
            rows.append([*about, where, measured, f"**{verdict}**"])
            about = ("", "", "")
    heads = ("claim", "the paper's own table", "held if", "where", "measured here", "verdict")
    return (
        f'"Not held" says that these figures do not show it, not that they show the opposite.\n\n{table(heads, rows)}'
    )


# ---------------------------------------------------------------- the paragraph


def _reproduces(content: Table, main: Table) -> Iterator[str]:
    """What does and does not reproduce, in sentences; every number is of the JSON."""
    yield from _teacher(main)
    yield from _beside_published(content["data"], main)
    yield from _stop_text(main)
    if (strong := unit(content, "strong")) is not None:
        yield f"A stronger teacher stands beside it, at {plus_minus(_first(strong))}:"
        yield from _stop_text(strong)


def _beside_published(data: str, run: Table) -> Iterator[str]:
    """How near the published cells are, and what is here where the paper's chains collapse."""
    if data not in PUBLISHED:
        return
    cells = [
        (chain, variant, theirs, ours.mean)
        for variant in (KD, DSKD)
        for chain, theirs in zip(columns(run), PUBLISHED[data][variant], strict=False)
        if (ours := accuracy(run, chain, variant)) is not None
    ]
    near = sum(abs(theirs - ours) <= NEAR for _, _, theirs, ours in cells)
    yield f"Of {len(cells)} published cells {near} are within {NEAR:g} points of ours."
    for chain, variant, theirs, ours in cells:
        if abs(theirs - ours) > COLLAPSE:
            yield f"{variant} on {chain} is {theirs:.2f} in the paper and {ours:.2f} here."


def _first(run: Table) -> Any:
    return on_labels(run, run["protocol"]["models"][0], "teacher")


def _teacher(run: Table) -> Iterator[str]:
    """Whether the teacher has anything to teach, and what preflight says of it."""
    teacher, *_, student = run["protocol"]["models"]
    theirs, ours = labels_by_seed(run, teacher, "teacher"), labels_by_seed(run, student, "control")
    difference = paired(theirs, ours)
    if difference is None:
        return
    how = "weaker" if difference.mean < 0 else "stronger"
    yield (
        f"The teacher {teacher} is {how} than its student: it has {plus_minus(spread(theirs.values()))}, {student} on "
        f"labels alone {plus_minus(spread(ours.values()))}, a difference of {interval(difference)} "
        f"points{_unsure(difference)}."
    )
    if warned := [text for text in run["warnings"] if WEAK in text]:
        times = len(warned)
        yield f'Preflight warns {times} times that a teacher is not above its student\'s control, first "{warned[0]}".'


def _unsure(found: Spread) -> str:
    """What to say of a difference whose interval holds 0."""
    return ", which may be chance" if found.low is None or found.low <= 0 <= (found.high or 0) else ""


def _stop_text(run: Table) -> Iterator[str]:
    """How far apart KD and DSKD are, and whether a chain collapses."""
    found = {chain: difference for chain in columns(run) if (difference := gain(run, chain)) is not None}
    if not found:
        return
    clear = [chain for chain, gain in found.items() if gain.low is not None and not gain.low <= 0 <= (gain.high or 0)]
    least, most = min(found.values(), key=lambda g: g.mean), max(found.values(), key=lambda g: g.mean)
    yield (
        f"DSKD less KD is between {least.mean:+.2f} and {most.mean:+.2f} points over {len(found)} chains; the 95 % "
        f"interval leaves out 0 for {', '.join(clear) or 'none of them'}."
    )
    lowest = min((a for chain in found if (a := accuracy(run, chain, DSKD)) is not None), key=lambda a: a.mean)
    yield f"The lowest mean of a chain under DSKD is {lowest.mean:.2f}."
