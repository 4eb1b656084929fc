"""What the table of DSKD says of a finished run: plain figures out of its result.json, journal and metrics."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tables import MEASURES, protocol, read

from kdcore.chains import Chain, chains, chosen, label, learners, stop
from kdcore.codec import digest
from kdcore.costs import costs
from kdcore.journal import Journal
from kdcore.progress import look

Table = Mapping[str, Any]


def facts(folder: Path) -> dict[str, Any]:
    """The figures of a finished run.

    Args:
        folder: of the run.
    """
    result = read(folder)
    stages = {stage["key"]: stage for stage in result["stages"]}
    found = chains(stages.values())
    best = chosen(result, found)
    return {
        "run": folder.name,
        "finished": result["run"]["finished"],
        "wall_seconds": look(folder, stages).seconds,
        "jobs": json.loads((folder / "run.json").read_bytes())["jobs"],
        "tag": digest(protocol_of(result))[:8],
        "protocol": protocol_of(result),
        "versions": result["versions"],
        "environment": next(iter(stages.values()))["environment"],
        "warnings": list(dict.fromkeys(result["warnings"])),
        "choices": result["choices"],
        "chosen": best and best.label,
        "evidence": result["evidence"],
        "trained": _trained(folder, stages),
        "costs": dataclasses.asdict(costs(result)),
        "labels": list(_labels(stages)),
        "chains": [_distilled(stages, chain) for chain in found],
    }


def protocol_of(result: Table) -> dict[str, Any]:
    """All that figures depend on which are to be compared."""
    recipe = result["recipe"]
    strategy = recipe["strategy"]
    models = [recipe["teacher"], *sorted(strategy["candidates"], key=_size, reverse=True), recipe["student"]]
    return {
        **protocol(result),
        "controller": recipe["controller"],
        "models": [_name(model) for model in models],
        "teacher": {key: value for key, value in recipe["teacher"].items() if value is not None},
        "baseline": strategy["baseline"],
        "mode": strategy["mode"],
    }


def _size(model: Table) -> int:
    return int(model["size"])


def _name(model: Table) -> str:
    return f"{model['model']}-{model['size']}"


def _trained(folder: Path, stages: Mapping[str, Table]) -> dict[str, float]:
    """The stages that this run trained by itself, by its journal, how often it began one, and their seconds."""
    starts = [record["key"] for record in Journal(folder / "journal.jsonl").of("start")]
    own = [stages[key]["seconds"] for key in dict.fromkeys(starts) if key in stages]
    return {"starts": len(starts), "stages": len(own), "seconds": round(sum(own), 3)}


def _labels(stages: Mapping[str, Table]) -> Iterator[dict[str, Any]]:
    """Teachers and controls: learners of stages that distil nobody."""
    for stage in stages.values():
        for role, member in stage["members"].items():
            if member["trained"] and not learners(stage):
                yield {"role": role, "model": member["model"], **_figures(stage, role)}


def _distilled(stages: Mapping[str, Table], chain: Chain) -> dict[str, Any]:
    """The last learner of a chain. Whatever it learned from is a chain of its own."""
    end = stages[chain.end.stage]
    stopped = stop(end)
    return {
        "chain": label(chain.models),
        "variant": "DSKD" if chain.controllers else "KD",
        "stop": stopped and stopped["tick"],
        "epochs": end["ticks"],
        **_figures(end, chain.end.member),
    }


def _figures(stage: Table, role: str) -> dict[str, Any]:
    member = stage["members"][role]
    measured = {name: member[key] for name, key in MEASURES.items()}
    work = {"seconds": round(stage["seconds"], 3), "flops": sum(stage["flops"].values()), "params": member["params"]}
    return {"seed": stage["seed"], "key": stage["key"][:12], **measured, **work}
