"""The page of the comparison of ways and batch sizes. It is made of the table's JSON alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prdkd_table import accuracy, by_seed
from tables import Spread, interval, paired, plus_minus, table, unpaired

Table = Mapping[str, Any]

MARGIN = 1.0
"""Points of accuracy: a way whose whole interval is this near to the textbook is as good. Named beforehand."""
TITLE = "# CIFAR-100: does the fast engine train as well, and what does the batch size do?"


def page(content: Table) -> str:
    """The whole page, Markdown."""
    runs = {run["name"]: run for run in content["runs"]}
    return "\n".join([f"{TITLE}\n", *_head(content), *_ways(content, runs), *_batches(content, runs)])


def _head(content: Table) -> Iterator[str]:
    yield f"```sh\n{chr(10).join(content['commands'])}\n```\n"
    if content["runs"]:
        yield f"{_where(content)}\n\n{_protocol(content)}\n"
    about, test = content["teacher"], 100 * content["teacher"]["test"]
    yield f"Teacher, the same for all: {test:.2f} (last of {about['epochs']} epochs).\n"
    yield (
        "Test accuracies in percent, mean ± sample standard deviation over seeds; the test split decides nothing. A "
        "short budget: figures say how ways differ, not what a method can reach. How long they take is a question for "
        "bench_training.py: here several runs share a machine.\n"
    )


def _where(content: Table) -> str:
    run = content["runs"][0]
    about, versions, ends = run["environment"], run["versions"], [run["finished"] for run in content["runs"]]
    return (
        f"{about['processor']} ({about['machine']}), {about['device']}, {about['threads']} threads; "
        f"kdcore {versions['kdcore']}, torch {versions['torch']}, torchvision "
        f"{versions['torchvision']}, Python {versions['python']}; finished {max(ends)[:10]}, "
        f"page made at {content['commit']}."
    )


def _protocol(content: Table) -> str:
    about = content["runs"][0]["protocol"]
    images, train, data = about["images"], about["train"], about["data"]
    terms = " and ".join(f"{term['loss']} x {term.get('weight', 1):g}" for term in _objective(about, "dkd"))
    return (
        f"{' -> '.join(about['models'])} by {terms}; {images['train']} training and {images['monitor']} monitor images "
        f"(split seed {data['split_seed']}), {images['test']} test images; crop with {data['shift']} pixels, flip; "
        f"{train['epochs']} epochs, {train['warmup_epochs']:g} of warm-up, lr {train['lr']:g} "
        f"at batch {_batch_size(content)}, {train['schedule']['name']}, gradients clipped at {train['clip']:g}; seeds "
        f"{', '.join(map(str, about['seeds']))}."
    )


def _batch_size(content: Table) -> int:
    """Of the ways, which the recipe's learning rate is meant for."""
    about = content["runs"][0]["protocol"]
    return int(about["train"].get("lr_batch") or about["data"]["batch_size"])


def _objective(about: Table, variant: str) -> list[Table]:
    return next(found["objective"] for found in about["strategy"]["variant"] if found["name"] == variant)


# ---------------------------------------------------------------- ways


def _ways(content: Table, runs: Mapping[str, Table]) -> Iterator[str]:
    textbook = {"name": "textbook", "students": content["textbook"]}
    ways = [run for name, run in runs.items() if not name.startswith("batch")]
    yield f"## Ways{f', at batch {_batch_size(content)}' if content['runs'] else ''}\n"
    yield (
        "Textbook: PIL transforms in a DataLoader, eager float32, the teacher run on every batch, random numbers of "
        "its own and a crop that fills in black; the others are kdcore in bfloat16, channels_last, compiled, filling "
        "in the mean colour. Less textbook: 95 % intervals by Welch, unpaired, since a seed means other random numbers "
        "there. Less live: by Student's t, paired by seed, as initial weights and the order of samples are the same.\n"
    )
    yield (
        f'Verdict, by a margin of {MARGIN:g} point that was named before: "within the margin" if the whole interval '
        'of less textbook lies in it, else "worse" if the whole interval lies below 0, else "undecided": so few '
        "seeds show neither. In its spread: whether the mean is no further above or below the textbook's than one "
        "standard deviation of the textbook's own seeds, which is a fact about these runs and proves no equality.\n"
    )
    beside = ("less textbook", "verdict", "in its spread", "less live")
    heads = ("way", "last epoch", "best on monitor", *beside)
    yield table(heads, [_way(way, textbook, runs.get("live")) for way in (textbook, *ways) if way["students"]])
    yield from _views(ways)


def _way(run: Table, textbook: Table, live: Table | None) -> list[str]:
    other = ("", "", "") if run is textbook else _beside(run, textbook)
    same = "" if run in (textbook, live) or live is None else interval(
        paired(by_seed(run, "dkd", "test"), by_seed(live, "dkd", "test"))
    )  # fmt: skip
    figures = [plus_minus(accuracy(run, "dkd", measure)) for measure in ("test", "test_at_best")]
    return [run["name"], *figures, *other, same]


def _beside(run: Table, textbook: Table) -> tuple[str, str, str]:
    """What a way's row says of it and the textbook."""
    found, own = gap(run, textbook), accuracy(textbook, "dkd", "test")
    if found is None or own is None:
        return "", "", ""
    near = "" if own.sd is None else "yes" if abs(found.mean) <= own.sd else "no"
    return interval(found), verdict(found), near


def verdict(found: Spread) -> str:
    """What a difference to the textbook shows; without an interval nothing."""
    if found.low is None or found.high is None:
        return "undecided"
    if found.low >= -MARGIN and found.high <= MARGIN:
        return "within the margin"
    return "worse" if found.high < 0 else "undecided"


def gap(run: Table, textbook: Table) -> Spread | None:
    """Points of the last epoch that a way is better than the textbook."""
    return unpaired(by_seed(run, "dkd", "test").values(), by_seed(textbook, "dkd", "test").values())


def _views(ways: list[Table]) -> Iterator[str]:
    """Says of caches that have a view for every epoch that no augmentation repeats."""
    for way in ways:
        epochs = way["protocol"]["train"]["epochs"]
        if way["cache"] and way["cache"]["views"] >= epochs:
            yield (
                f"{way['name']}: of {epochs} epochs each has a view of its own, so no augmentation repeats, and what "
                "differs from live is rounding: outputs are stored in float16, and computed in other batches.\n"
            )


# ---------------------------------------------------------------- batches


def _batches(content: Table, runs: Mapping[str, Table]) -> Iterator[str]:
    found = [run for name, run in runs.items() if name.startswith("batch")]
    if not found and not content["failed"]:
        return
    yield "## Batch sizes\n"
    if found:
        weights = [_objective(found[0]["protocol"], name)[1]["weight"] for name in ("dkd", "dkd-class")]
        views = found[0]["cache"]["views"]
        yield (
            f"{views} cached views. Learning rates in proportion to the batch, epochs the same. The weight of DKD is "
            f"{weights[0]:g}, of its class-normalised form {weights[1]:g}: what prdkd-short.md chose, at every batch. "
            "The gain is paired by seed, with 95 % intervals by Student's t.\n"
        )
        heads = ("batch", "lr", "updates", "dkd", "dkd-class", "class less none")
        yield table(heads, map(_batch, found))
    for name, text in content["failed"].items():
        yield f"{name} ended: {text}\n"


def _batch(run: Table) -> list[str]:
    about = run["protocol"]
    size, train = about["data"]["batch_size"], about["train"]
    updates = about["images"]["train"] // size * train["epochs"]
    figures = [plus_minus(accuracy(run, name, "test")) for name in ("dkd", "dkd-class")]
    gain = interval(paired(*(by_seed(run, name, "test") for name in ("dkd-class", "dkd"))))
    rate = f"{train['lr'] * size / train['lr_batch']:g}"
    return [str(size), rate, str(updates), *figures, gain]
