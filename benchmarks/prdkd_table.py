"""The page of the table of class-normalised distillation. It is made of the table's JSON alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prdkd_published import FIRST_PARTY, published
from tables import Spread, interval, paired, plus_minus, spread, table

Table = Mapping[str, Any]

TITLE = "# CIFAR-100: KD and DKD with and without class normalisation, and what they are compared with"
FULL_EPOCHS = 200
CONTRASTS = (("kd-class", "kd"), ("kd-instance", "kd"), ("dkd", "kd"), ("dkd-class", "dkd"), ("dkd-class", "kd-class"))


def page(content: Table) -> str:
    """The whole page, Markdown."""
    return "\n".join([f"{TITLE}\n", *_head(content), *(text for run in content["runs"] for text in _run(run))])


def _head(content: Table) -> Iterator[str]:
    yield f"```sh\n{chr(10).join(content['commands'])}\n```\n"
    yield (
        "Test accuracies in percent, mean ± sample standard deviation over seeds: of the last epoch, and of the epoch "
        "that is best on the monitor split. The test split decides nothing. Published figures are of other protocols: "
        "they train on all training images, and most are the best epoch on the test split.\n"
    )


def _run(run: Table) -> Iterator[str]:
    about = run["protocol"]
    short = about["train"]["epochs"] < FULL_EPOCHS
    yield f"## {run['name']}{': short budget: no verdict' if short else ''}\n"
    yield f"{_where(run)}\n\nProtocol `{run['tag']}`: {_protocol(about)}\n"
    teacher = run["teacher"]
    yield f"Teacher: {100 * teacher['test']:.2f} (last), {100 * teacher['test_at_best']:.2f} (best on monitor).\n"
    yield table(("method", "chosen", "last", "best on monitor", "paper", "its authors"), map(_row(run), _names(run)))
    if differences := list(_differences(run)):
        yield "Differences of the last epoch, paired by seed, with 95 % intervals by Student's t:\n"
        yield table(("less", "points"), differences)
    if run["grid"]:
        epochs = about["train"]["epochs"]
        spent = f"{about['strategy'].get('grid_epochs') or epochs} of {epochs} epochs"
        yield f"The grid (monitor split, one seed, {spent}); the chosen point in bold:\n"
        yield table(("method", "tried: accuracy"), [[name, _tried(run, name)] for name in _names(run)])
    if run["warnings"]:
        yield "Warnings of the run:\n\n" + "".join(f"- {text}\n" for text in run["warnings"])


def _names(run: Table) -> list[str]:
    return [variant["name"] for variant in run["protocol"]["strategy"]["variant"]]


def _row(run: Table) -> Any:
    def row(name: str) -> list[str]:
        first = FIRST_PARTY.get(run["name"], {}).get(name)
        paper = published(run["name"], name)
        return [
            name, _chosen(run, name), plus_minus(accuracy(run, name, "test")),
            plus_minus(accuracy(run, name, "test_at_best")),
            "" if paper is None else f"{paper:.2f}", "" if first is None else f"{first:.2f}",
        ]  # fmt: skip

    return row


def by_seed(run: Table, name: str, measure: str) -> dict[int, float]:
    """Seed -> accuracy in percent."""
    return {row["seed"]: 100 * row[measure] for row in run["students"] if row["variant"] == name}


def accuracy(run: Table, name: str, measure: str) -> Spread | None:
    """Percent over seeds."""
    return spread(by_seed(run, name, measure).values())


def _differences(run: Table) -> Iterator[list[str]]:
    names = _names(run)
    for ours, theirs in CONTRASTS:
        if ours in names and theirs in names:
            gap = paired(by_seed(run, ours, "test"), by_seed(run, theirs, "test"))
            yield [f"{ours} less {theirs}", interval(gap)]


def best_point(run: Table, name: str) -> Table | None:
    """The first of the points that are best on the monitor split; None without a grid."""
    tried = [row for row in run["grid"] if row["variant"] == name and row["monitor"] is not None]
    return max(tried, key=lambda row: row["monitor"], default=None)


def _chosen(run: Table, name: str) -> str:
    best = best_point(run, name)
    if best is None:
        return ""
    tried = [row["point"] for row in run["grid"] if row["variant"] == name]
    edge = any(_at_edge(value, {point[path] for point in tried}) for path, value in best["point"].items())
    return _words(best["point"]) + (" (edge of the grid)" if edge else "")


def _at_edge(value: Any, values: set[Any]) -> bool:
    """The smallest or largest of several numbers, beyond which a better one may lie."""
    return not isinstance(value, str | bool) and len(values) > 1 and value in (min(values), max(values))


def _tried(run: Table, name: str) -> str:
    best = best_point(run, name)
    rows = [row for row in run["grid"] if row["variant"] == name]
    cells = [f"{_words(row['point'])}: {_percent(row['monitor'])}" for row in rows]
    return "; ".join(f"**{cell}**" if row is best else cell for cell, row in zip(cells, rows, strict=True))


def _percent(share: float | None) -> str:
    return "diverged" if share is None else f"{100 * share:.2f}"


def _words(point: Table) -> str:
    return ", ".join(f"{path.rpartition('.')[2]} {_word(value)}" for path, value in point.items())


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _where(run: Table) -> str:
    about, versions = run["environment"], run["versions"]
    hours = sum(stage["seconds"] for stage in run["stages"]) / 3600
    return (
        f"{about['processor']} ({about['machine']}), {about['device']}, {about['threads']} threads a stage, "
        f"{run['jobs']} at once; kdcore {versions['kdcore']}, torch {versions['torch']}, Python {versions['python']}; "
        f"{hours:.2f} hours of training, finished {run['finished'][:10]}."
    )


def _protocol(about: Table) -> str:
    images, train, data = about["images"], about["train"], about["data"]
    teacher = train["teacher"].get("epochs", train["epochs"])
    grid = about["strategy"].get("grid_epochs")
    return (
        f"{' -> '.join(about['models'])}; {images['train']} training and {images['monitor']} monitor images (split "
        f"seed {data['split_seed']}), {images['test']} test images; teacher {teacher}, students {train['epochs']} "
        f"epochs{f', grid {grid}' if grid else ''}; batch {data['batch_size']}, lr {train['lr']:g}, schedule "
        f"{train['schedule']['name']}, {about['precision']}; seeds {', '.join(map(str, about['seeds']))}, one teacher."
    )
