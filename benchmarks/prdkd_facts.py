"""What the table of class-normalised distillation says of a finished run: plain figures out of its result.json."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tables import MEASURES, protocol, read

from kdcore.codec import digest
from kdcore.progress import look

Table = Mapping[str, Any]

GRID = "(grid)"
"""How the strategy ends the names of a grid's stages."""


def facts(folder: Path) -> dict[str, Any]:
    """The figures of a finished run of the strategy ``variants``."""
    result = read(folder)
    stages = {stage["key"]: stage for stage in result["stages"]}
    about = protocol_of(result)
    return {
        "run": folder.name,
        "finished": result["run"]["finished"],
        "wall_seconds": look(folder, stages).seconds,
        "jobs": json.loads((folder / "run.json").read_bytes())["jobs"],
        "tag": digest(about)[:8],
        "protocol": about,
        "versions": result["versions"],
        "environment": next(iter(stages.values()))["environment"],
        "warnings": list(dict.fromkeys(result["warnings"])),
        "choices": [{key: choice[key] for key in ("text", "margin", "error")} for choice in result["choices"]],
        "teacher": {name: result["teacher"][key] for name, key in MEASURES.items()},
        "grid": list(_grid(result)),
        "students": [_student(name, row) for name, rows in result["replicates"].items() for row in rows],
        "stages": [_stage(stage) for stage in stages.values()],
    }


def protocol_of(result: Table) -> dict[str, Any]:
    """All that figures depend on which are to be compared."""
    recipe = result["recipe"]
    return {
        **protocol(result),
        "strategy": recipe["strategy"],
        "models": [recipe[role]["model"] for role in ("teacher", "student")],
        "model_options": [_options(recipe[role]) for role in ("teacher", "student")],
        "channels_last": recipe["channels_last"],
    }


def _options(model: Table) -> dict[str, Any]:
    """All of a model's table but its name and where its weights lie."""
    return {key: value for key, value in model.items() if key not in ("model", "weights")}


def _grid(result: Table) -> Iterator[dict[str, Any]]:
    """Every point that was tried, with its accuracy on the monitor split."""
    stages = [stage for stage in result["stages"] if stage["name"].endswith(GRID)]  # a variant may have a point's name
    tried = {name: member for stage in stages for name, member in stage["members"].items()}
    for variant in result["recipe"]["strategy"]["variant"]:
        grid = variant.get("grid", {})
        for number, values in enumerate(itertools.product(*grid.values()), 1) if grid else ():
            found = tried[f"{variant['name']}-{number}"]
            point = dict(zip(grid, values, strict=True))
            yield {
                "variant": variant["name"],
                "point": point,
                "monitor": found["monitor_accuracy_last"],
            }  # None: diverged


def _student(name: str, row: Table) -> dict[str, Any]:
    measured = {measure: row[key] for measure, key in MEASURES.items()}
    return {"variant": name, "seed": row["seed"], "key": row["stage"][:12], **measured}


def _stage(stage: Table) -> dict[str, Any]:
    return {
        "name": stage["name"],
        "seconds": round(stage["seconds"], 3),
        "images_per_second": stage["images_per_second"],
    }
