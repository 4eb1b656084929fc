"""KD and DKD with and without class normalisation on CIFAR-100, and the methods that they are compared with.

    python benchmarks/table_prdkd.py --root FOLDER --pairs short                 # a few hours on a CPU
    python benchmarks/table_prdkd.py --root FOLDER --pairs resnet56-resnet20 --methods kd dkd dkd-class
    python benchmarks/table_prdkd.py --pairs short --check                       # does the table say what the runs say?

A pair is a recipe of examples/cifar100 by its name, "ablation" and "short" among them. FOLDER holds the data in
torchvision's layout. Runs and their store lie in --runs; the same command goes on where one was killed. ``--settings
field`` takes the batch, the epochs and DKD's beta that most published runs have, instead of those of the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prdkd_facts import facts
from prdkd_published import FIELD_BETA
from prdkd_table import page
from tables import command, differences, ending, pretty, read_book, told, written

import kdcore
from kdcore.errors import KdError
from kdcore.files import replace_file
from kdcore.overrides import override, read
from kdcore.store import Store

HERE = Path(__file__).resolve().parent
PLACES = {"--root": "FOLDER", "--runs": "RUNS", "--out": "OUT", "--recipes": "RECIPES"}
RECIPES = HERE.parent / "examples" / "cifar100"
FIELD = ("data.batch_size=64", "train.epochs=240", "train.schedule={name = 'step', milestones = [150, 180, 210]}")


def main(arguments: Sequence[str]) -> int:
    """What the command line says; the exit status."""
    options = _parser().parse_args(arguments)
    if options.check:
        return check(options)
    deadline = None if options.budget_minutes is None else time.monotonic() + 60 * options.budget_minutes
    return train(options, command("table_prdkd.py", arguments, PLACES), deadline)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", nargs="+", default=["short"], help="names of recipes in examples/cifar100, default short")
    add("--methods", nargs="+", default=[], help="variants of the recipe, default all")
    add("--epochs", type=int, help="of the students, default the recipe's; milestones and warm-ups in proportion")
    add("--seeds", type=int, help="of every student, default the recipe's")
    add("--settings", choices=("recipe", "field"), default="recipe", help="default recipe")
    add("--root", type=Path, help="folder of the data's files")
    add("--sets", nargs="+", default=[], metavar="KEY=VALUE", help="further changes of the recipe")
    add("--jobs", type=int, default=1, help="stages at once, default 1")
    add("--runs", type=Path, default=Path("runs/prdkd"), help="runs and their store, default runs/prdkd")
    add("--budget-minutes", type=float, help="end after so many minutes; the same call goes on")
    add("--out", type=Path, default=HERE / "results", help="of the table, default benchmarks/results")
    add("--name", default="short", help="of the table's files, prdkd-NAME.json and .md; default short")
    add("--check", action="store_true", help="compare the table with --runs; exit 1 if unlike")
    add("--recipes", type=Path, default=RECIPES, help=argparse.SUPPRESS)
    return parser


# ---------------------------------------------------------------- recipes


def recipe_of(pair: str, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a pair with what the command line changes."""
    recipe = read(options.recipes / f"{pair}.toml")
    sets = [*(FIELD if options.settings == "field" else ()), *options.sets]
    if options.root is not None:
        sets.append(f"data.root={json.dumps(str(options.root.resolve()))}")
    if options.seeds is not None:
        sets.append(f"strategy.seeds={options.seeds}")
    for text in sets:
        recipe = override(recipe, text)
    variants = recipe["strategy"]["variant"]
    if options.methods:
        variants = _named(variants, options.methods)
    if options.settings == "field":
        variants = [_field(variant, FIELD_BETA.get(pair, 8.0)) for variant in variants]
    recipe["strategy"] = {**recipe["strategy"], "variant": variants}
    return recipe if options.epochs is None else _shortened(recipe, options.epochs)


def _named(variants: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Mapping[str, Any]]:
    known = {variant["name"]: variant for variant in variants}
    for name in names:
        if name not in known:
            raise kdcore.RecipeError(f"no method {name!r}", where="--methods", fix=kdcore.suggest(name, known))
    return [known[name] for name in names]


def _field(variant: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """The variant with the pair's beta in plain DKD."""
    terms = [
        {**term, "beta": beta} if term["loss"] == "dkd" and "normalize" not in term else term
        for term in variant["objective"]
    ]
    return {**variant, "objective": terms}


def _shortened(recipe: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """Lengths, milestones and warm-ups in proportion to the students' epochs; the grid keeps its own."""
    train = dict(recipe["train"])
    share = epochs / train["epochs"]
    train = _warmed(train, share) | {"epochs": epochs, "schedule": _scaled(train.get("schedule", "cosine"), share)}
    if "teacher" in train:
        teacher = _warmed(train["teacher"], share)
        if "epochs" in teacher:
            teacher["epochs"] = max(1, round(teacher["epochs"] * share))
        if "schedule" in teacher:
            teacher["schedule"] = _scaled(teacher["schedule"], share)
        train["teacher"] = teacher
    strategy = dict(recipe["strategy"])
    strategy["variant"] = [
        {**variant, "objective": [_warmed(term, share) for term in variant["objective"]]}
        for variant in strategy["variant"]
    ]
    return {**recipe, "train": train, "strategy": strategy}


def _warmed(table: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The table with its warm-up, if it has one, at this share."""
    warmup = {"warmup_epochs": table["warmup_epochs"] * share} if "warmup_epochs" in table else {}
    return {**table, **warmup}


def _scaled(schedule: Any, share: float) -> Any:
    if not isinstance(schedule, Mapping) or "milestones" not in schedule:
        return schedule
    return {**schedule, "milestones": [milestone * share for milestone in schedule["milestones"]]}


# ---------------------------------------------------------------- training


def train(options: argparse.Namespace, command: str, deadline: float | None) -> int:
    """Runs the pairs one after the other, and writes the table after each; 3 if the time was up before the end."""
    book = read_book(_book_path(options))
    book["commands"] = list(dict.fromkeys([*book["commands"], command]))
    for pair in options.pairs:
        recipe = recipe_of(pair, options)
        try:
            with ending(deadline):
                found = kdcore.run(recipe, root=options.runs, jobs=options.jobs)
        except KeyboardInterrupt:
            if deadline is None or time.monotonic() < deadline:
                raise
            print(f"The time is up before {pair!r} is finished; the same command goes on.")
            return 3
        book["runs"] |= {found.folder.name: pair}
        replace_file(_book_path(options), json.dumps(book, indent=1).encode())
        _write(options, contents(options, book))
    return 0


def _book_path(options: argparse.Namespace) -> Path:
    path: Path = options.runs / f"table-{options.name}.json"
    return path


def contents(options: argparse.Namespace, book: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of the runs that the book names."""
    runs = [{"name": pair, **facts(options.runs / folder)} for folder, pair in book["runs"].items()]
    return {"commands": book["commands"], "runs": runs}


def _write(options: argparse.Namespace, content: Mapping[str, Any]) -> None:
    for path, text in ((_file(options, "json"), pretty(content) + "\n"), (_file(options, "md"), page(content))):
        replace_file(path, text.encode())
        print(path)


def _file(options: argparse.Namespace, suffix: str) -> Path:
    path: Path = options.out / f"prdkd-{options.name}.{suffix}"
    return path


def check(options: argparse.Namespace) -> int:
    """Prints every difference between the table, its runs and their store; 1 if there is one."""
    content = json.loads(written(_file(options, "json")))
    runs = {run["run"]: run["name"] for run in content["runs"]}
    again = contents(options, {"commands": content["commands"], "runs": runs})
    folders = [options.runs / folder for folder in runs]
    files = _file(options, "json"), _file(options, "md")
    found = differences(files, again, page(content), folders, Store(options.runs / "store"))
    return told(found)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (KdError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
