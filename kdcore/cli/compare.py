"""``kdcore compare``: tables of finished runs, and of the chains within one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..chains import chains, directs
from ..compare import CONFIDENCE, Comparison, Finding, Gap, Sample, Variant, check_finding, compare, gap, samples_of
from ..errors import RecipeError
from ..files import replace_file
from ..options import shown
from ..plan import Json
from ..progress import is_finished
from ..reading import read_table
from .tree import spread

SCOPE = (
    f"Differences of test accuracies, paired by seed: mean in points and {CONFIDENCE:.0%} interval of Student's t. "
    "The interval is over seeds alone: it does not cover the choice of test images or of the split."
)
WIDEST = 10_000  # a terminal in which everything fits
WEIGHTS = {"last": "the last epoch's weights", "best": "the weights that were best on the monitor split"}


def compare_runs(folders: Sequence[Path], chains: bool, mix: bool, target: Path | None) -> None:
    """Prints the comparison of finished runs, and writes it to ``target`` as JSON."""
    findings = {str(folder): read_finding(folder) for folder in folders}
    if len(findings) < 2 and not chains:
        fix = "Name two runs or more; --chains compares the chains within one."
        raise RecipeError("one run has nothing to be compared with", where="kdcore compare", fix=fix)
    found = compare(findings, chains, mix)
    if target is not None:
        from ..runner import pretty

        replace_file(target, pretty(as_json(found)))
    _show(found, Console())


def read_finding(folder: Path) -> Finding:
    """What the result.json of a finished run says.

    Raises:
        RecipeError: no run, or one that is not finished.
        StorageError: its result.json is damaged.
    """
    if not (folder / "run.json").is_file() and not (folder / "result.json").is_file():
        raise RecipeError("no run of kdcore", where=str(folder), fix="Give its folder, e.g. runs/digits-1a2b3c4d.")
    if not is_finished(folder):
        raise RecipeError("the run is not finished", where=str(folder), fix="kdcore resume it first.")
    path = folder / "result.json"
    return check_finding(read_table(path), str(path))


def _show(found: Comparison, console: Console) -> None:
    table, room = _table(found, named=True), console.options.update(width=WIDEST)
    fits = console.measure(table, options=room).maximum <= console.width
    console.print(table if fits else _table(found, named=False))
    for text in (*_legend(found, not fits), *_unpaired(found.gaps), SCOPE, _cost(found.variants[0])):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for key, values in found.mixed.items():
        said = ", ".join(f"{run} {str(value)[:12]}" for run, value in values.items())
        text = f"WARNING  protocols differ, so the numbers are not comparable: {key}: {said}"
        console.print(text, style="bold yellow", markup=False, highlight=False, soft_wrap=True)


def _legend(found: Comparison, named: bool) -> Iterator[str]:
    """What the numbers of the variants stand for, and what differs between their recipes.

    Args:
        found: the variants.
        named: name the chains, for which the table has no room.
    """
    runs = {variant.runs for variant in found.variants}
    shared = found.variants[0].chain and len(runs) == 1
    for number, variant in enumerate(found.variants, 1):
        said = [variant.chain if named else "", *(() if shared else variant.runs)]
        if any(said):
            yield f"{number}: {', '.join(filter(None, said))}"
    if shared:
        yield f"All chains are of {', '.join(found.variants[0].runs)}."
    for key in found.variants[0].settings:
        values = (variant.settings[key] for variant in found.variants)
        yield f"{key}: {' | '.join('not set' if value is None else shown(value) for value in values)}"
    if len(found.variants) == 1:
        yield "All runs are of one recipe: name runs of another to compare them with."


def _unpaired(gaps: Sequence[Gap]) -> Iterator[str]:
    for number, one in enumerate(gaps, 1):
        for seeds, of in ((one.unpaired, number), (one.missing, 1)):
            if seeds:
                yield f"Without a partner between 1 and {number}: seed {', '.join(map(str, seeds))} of {of}."


def _cost(variant: Variant) -> str:
    what = (
        "of the stages that lead to a chain, mean over seeds" if variant.chain else "of a run's stages, mean over runs"
    )
    return f"TFLOPs and seconds are those of training, the sum {what}."


def _table(found: Comparison, named: bool) -> Table:
    heads = _accuracy_heads(variant.samples for variant in found.variants)
    table = _columns("", "n", *heads, "TFLOPs", "seconds", "difference to 1")
    for number, (variant, one) in enumerate(zip(found.variants, found.gaps, strict=True), 1):
        name = Text(f"{number} {variant.chain if named else ''}".strip())
        difference = "" if number == 1 else interval(one)
        table.add_row(name, *accuracies(variant.samples), *_costs(variant), difference)
    return table


def _columns(*heads: str, title: str = "") -> Table:
    """Of names and numbers; where a terminal is narrow, names are folded."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=title, title_justify="left", title_style="")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=number > 0)
    return table


def _costs(variant: Variant) -> tuple[str, str]:
    return f"{variant.flops / 1e12:,.3f}", f"{variant.seconds:,.1f}"


def accuracies(samples: Sequence[Sample]) -> tuple[str, str, str]:
    """Number of seeds, and mean and standard deviation on the test and on the monitor split, in percent."""
    return str(len(samples)), spread([s.test for s in samples]), spread([s.monitor for s in samples])


def _accuracy_heads(found: Iterable[Sequence[Sample]]) -> tuple[str, str]:
    """Heads of the columns of accuracies, which say what stands behind a ± where there is one."""
    said = "\nmean ± sd" if any(len(samples) > 1 for samples in found) else ""
    return f"test %{said}", f"monitor %{said}"


def interval(found: Gap) -> str:
    """``+0.42 [-0.10, +0.94]`` in points."""
    if found.mean is None:
        return "no pairs"
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.2f} (no interval: 1 pair)"
    return f"{100 * found.mean:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def as_json(found: Comparison) -> dict[str, Json]:
    """What ``--json`` writes."""
    return {"interval": SCOPE, **dataclasses.asdict(found)}


# ---------------------------------------------------------------- the chains of one run


def chains_table(result: Mapping[str, Any]) -> Table:
    """The replicates of a run that is just finished, each against the direct student under the same controllers.

    Args:
        result: the content of a result.json with replicates.
    """
    finding = check_finding(result, "result.json")
    named, direct = finding.replicates, directs(chains(result["stages"]))
    rows = {(row.stage, row.member): row for own in named.values() for row in own}
    found, others = {}, {}
    for name, own in named.items():
        ends = [direct.get((row.stage, row.member)) for row in own]
        found[name] = samples_of(own, finding.run.seed)
        others[name] = samples_of([rows[end] for end in ends if end in rows], finding.run.seed)
    heads = ["over direct"] if any(others.values()) else []
    table = _columns("chain", "n", *_accuracy_heads(found.values()), *heads, title=_title(finding, bool(heads)))
    for i, (name, samples) in enumerate(found.items()):
        over = [interval(gap(samples, others[name])) if others[name] else ""] if heads else []
        table.add_row(Text(name if i else f"{name} (chosen)"), *accuracies(samples), *over, style="" if i else "bold")
    return table


def _title(finding: Finding, compared: bool) -> str:
    said = f"Students of {WEIGHTS.get(str(finding.protocol['selection']), '')}"
    over = f"the direct one under the same controllers, in points with {CONFIDENCE:.0%} intervals over seeds"
    return f"{said}; differences to {over}" if compared else said
