"""Does the fast engine train students as accurate as the code that people publish? And what does the batch size do?

    python benchmarks/equal_science.py --root FOLDER                    # hours on a CPU; again: goes on
    python benchmarks/equal_science.py --root FOLDER --epochs 1 --teacher-epochs 1 --seeds 1 --runs TRY --out TRY
    python benchmarks/equal_science.py --check                          # does the table say what the runs say?

The students of examples/cifar100/short.toml, all under one teacher: by textbook_loop.py, by kdcore with a live teacher
and with a cached one; then DKD and its class-normalised form as the batch grows. FOLDER holds the data in torchvision's
layout. Runs and their store lie in --runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from losses_report import git
from prdkd_facts import facts
from prdkd_table import best_point
from science_page import page
from tables import MEASURES, command, differences, pretty, told, written
from tables import read as read_result

import kdcore
from kdcore.codec import digest
from kdcore.errors import KdError, NumericError
from kdcore.files import replace_file
from kdcore.overrides import override, read
from kdcore.store import Store

HERE = Path(__file__).resolve().parent
PLACES = {"--root": "FOLDER", "--runs": "RUNS", "--out": "OUT"}
RECIPE = HERE.parent / "examples" / "cifar100" / "short.toml"
WEIGHTS = HERE / "results" / "prdkd-short.json"
VIEWS = (1, 4, 16)
BATCHES = (64, 256, 1024, 4096)

Recipe = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """What the command line says; the exit status."""
    options = _parser().parse_args(arguments)
    if options.check:
        return check(options)
    train(options, command("equal_science.py", arguments, PLACES))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=10, help="of the students, default 10")
    add("--teacher-epochs", type=int, default=24, help="default 24")
    add("--seeds", type=int, default=3, help="of every student, default 3")
    add("--workers", type=int, default=2, help="of the textbook's DataLoader, default 2")
    add("--root", type=Path, default=Path("data"), help="folder of the data's files, default data")
    add("--sets", nargs="+", default=[], metavar="KEY=VALUE", help="further changes of the recipe")
    add("--runs", type=Path, default=Path("runs/science"), help="runs and their store, default runs/science")
    add("--out", type=Path, default=HERE / "results", help="of the table, default benchmarks/results")
    add("--check", action="store_true", help="compare the table with --runs; exit 1 if unlike")
    return parser


# ---------------------------------------------------------------- recipes


class TeacherAlone:
    """A strategy that trains the teacher on labels, and nobody else."""

    Options = kdcore.Options

    def plan(self, run: kdcore.RunView, options: kdcore.Options) -> kdcore.Plan:
        stage = run.label_only("teacher", run.teacher)
        yield stage
        return kdcore.Outcome(stage["teacher"], stage["teacher"])


class Offered:
    """The plugin that offers it."""

    @staticmethod
    @kdcore.hookimpl
    def kdcore_register(registry: kdcore.Registrar) -> None:
        registry.strategy("teacher-alone", TeacherAlone, about="the teacher and nobody else")


def base(options: argparse.Namespace) -> Recipe:
    """The recipe with the command line's data, budgets and changes."""
    sets = [f"data.root={json.dumps(str(options.root.resolve()))}", f"train.epochs={options.epochs}"]
    sets += [f"train.teacher.epochs={options.teacher_epochs}", *options.sets]
    recipe = read(RECIPE)
    for text in sets:
        recipe = override(recipe, text)
    return recipe


def teacher_recipe(options: argparse.Namespace) -> Recipe:
    """Of the teacher that all share, trained as the recipe says."""
    return base(options) | {"strategy": {"name": "teacher-alone"}}


def recipes(options: argparse.Namespace, teacher: Path) -> Iterator[tuple[str, Recipe]]:
    """Of every run of kdcore by name: the ways, then the batches."""
    plain, normalised = _variant("dkd"), _variant("dkd-class", normalize="class")
    yield "live", _students(options, teacher, [plain])
    for views in VIEWS:
        yield f"views {views}", _students(options, teacher, [plain], {"cache.views": views})
    meant_for = base(options)["data"]["batch_size"]
    for batch in BATCHES:
        sets = {"cache.views": 4, "data.batch_size": batch, "train.lr_batch": meant_for}
        yield f"batch {batch}", _students(options, teacher, [plain, normalised], sets)


def _students(
    options: argparse.Namespace, teacher: Path, variants: Sequence[Any], sets: Mapping[str, Any] | None = None
) -> Recipe:
    recipe = base(options) | {"compile": True}
    recipe["teacher"] = {**recipe["teacher"], "weights": str(teacher)}
    recipe["train"] = {key: value for key, value in recipe["train"].items() if key != "teacher"}
    recipe["strategy"] = {"name": "variants", "seeds": options.seeds, "variant": variants}
    for key, value in (sets or {}).items():
        recipe = override(recipe, f"{key}={value}")
    return recipe


def _variant(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "objective": [{"loss": "cross_entropy"}, {"loss": "dkd", "weight": weight_of(name), **more}]}


def weight_of(variant: str) -> float:
    """The weight that the table of the recipe chose for a variant."""
    (run,) = json.loads(WEIGHTS.read_bytes())["runs"]
    point = best_point(run, variant)
    assert point is not None, "the table has a grid"
    return float(point["point"]["dkd.weight"])


# ---------------------------------------------------------------- training


def train(options: argparse.Namespace, command: str) -> None:
    """The teacher, then every run, and the textbook's between ways and batches; writes the table after each.

    The table has what this call makes or finds made, and nothing that a call with other options left.
    """
    print("teacher", flush=True)
    taught = kdcore.run(teacher_recipe(options), root=options.runs, plugins=[Offered])
    book = {"commands": [command], "commit": git("rev-parse", "--short", "HEAD"), "teacher": taught.folder.name}
    book |= {"textbook": [], "runs": {}, "failed": {}}
    for name, recipe in recipes(options, taught.folder / "student.safetensors"):
        if name == f"batch {BATCHES[0]}":
            _textbook(options, taught.folder / "student.safetensors", book)
        print(name, flush=True)
        try:
            book["runs"][kdcore.run(recipe, root=options.runs).folder.name] = name
        except NumericError as error:
            book["failed"][name] = str(error)
            print(error, flush=True)
        _write(options, book)


def _textbook(options: argparse.Namespace, teacher: Path, book: dict[str, Any]) -> None:
    """One JSON a seed; those that are there are kept."""
    import torch
    from textbook_loop import Lesson, trained

    from kdcore.training.device import sandbox

    recipe = base(options)
    for seed in range(recipe["seed"], recipe["seed"] + options.seeds):
        models = (recipe["teacher"]["model"], recipe["student"]["model"])
        lesson = Lesson(models, teacher, recipe["data"], recipe["train"], weight_of("dkd"), seed, options.workers)
        path = options.runs / f"textbook-{_tag(lesson)}.json"
        if not path.exists():
            print(path.stem, flush=True)
            with sandbox(torch.device("cpu"), recipe["threads"]):
                found = trained(lesson, _splits(recipe), lambda text: print(text, flush=True))
            replace_file(path, json.dumps(found).encode())
        book["textbook"].append(path.name)
        _write(options, book)


def _tag(lesson: Any) -> str:
    """A name for what a student is trained by, but for where its data and its teacher lie."""
    about = {key: value for key, value in lesson.data.items() if key != "root"}
    return f"{digest([*lesson.models, lesson.weights.parent.name, about, lesson.train, lesson.dkd])[:8]}-{lesson.seed}"


def _splits(recipe: Recipe) -> Any:
    """As kdcore carves them."""
    from kdcore.executor import DataCache
    from kdcore.plugins import load_plugins
    from kdcore.recipe import compile_recipe, load

    catalog = load_plugins().catalog
    return DataCache(catalog)(compile_recipe(load(recipe), catalog)[0].data)


# ---------------------------------------------------------------- the table


def contents(options: argparse.Namespace, book: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of the runs that the book names."""
    taught = read_result(options.runs / book["teacher"])
    teacher = {name: taught["teacher"][key] for name, key in MEASURES.items()}
    return {
        **{key: book[key] for key in ("commands", "commit", "failed")},
        "teacher": {**teacher, "run": book["teacher"], "epochs": taught["stages"][0]["length"]},
        "textbook": [{"file": name, **json.loads((options.runs / name).read_bytes())} for name in book["textbook"]],
        "runs": [_run(options.runs / folder, name) for folder, name in book["runs"].items()],
    }


def _run(folder: Path, name: str) -> dict[str, Any]:
    recipe = read_result(folder)["recipe"]
    return {"name": name, "cache": recipe["cache"], "compile": recipe["compile"], **facts(folder)}


def _write(options: argparse.Namespace, book: Mapping[str, Any]) -> None:
    content = contents(options, book)
    for path, text in zip(_files(options), (pretty(content) + "\n", page(content)), strict=True):
        replace_file(path, text.encode())


def _files(options: argparse.Namespace) -> tuple[Path, Path]:
    return options.out / "equal-science.json", options.out / "equal-science.md"


def check(options: argparse.Namespace) -> int:
    """Prints every difference between the table, its runs and their store; 1 if there is one."""
    content = json.loads(written(_files(options)[0]))
    book = {key: content[key] for key in ("commands", "commit", "failed")}
    book["teacher"] = content["teacher"]["run"]
    book["textbook"] = [row["file"] for row in content["textbook"]]
    book["runs"] = {run["run"]: run["name"] for run in content["runs"]}
    folders = [options.runs / folder for folder in book["runs"]]
    again = contents(options, book)
    found = differences(_files(options), again, page(content), folders, Store(options.runs / "store"))
    return told(found)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (KdError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
