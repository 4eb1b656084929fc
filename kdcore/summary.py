"""result.json: what a run found, with the protocol under which it was found."""

from __future__ import annotations

import math
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import __version__
from .chains import CONTROL
from .plan import Choice, Json, Outcome, ResultRef, Stage

if TYPE_CHECKING:
    from .runner import Run


def summarise(run: Run, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The content of result.json."""
    from .runner import now

    chain = _chain(outcome.student)
    stages = list(run.results.values())
    warnings = [*run.warnings, *(f"{stage['name']}: {text}" for stage in stages for text in stage["warnings"])]
    student, control = _member(run, outcome.student), _member(run, _control(outcome.student))
    warnings += _below(student, control, len(run.context.load(run.view.data).monitor))
    return {
        "kdcore": __version__,
        "run": {**run.info, "seconds": seconds, "finished": now()},
        "protocol": _protocol(run, outcome),
        "student": student,
        "teacher": _member(run, outcome.teacher or (chain[0] if len(chain) > 1 else None)),
        "control": control,
        "chain": [_link(run, ref) for ref in chain],
        "stages": stages,
        "choices": [chosen(run, choice) for choice in run.choices],
        "replicates": {name: [_replicate(run, ref) for ref in refs] for name, refs in outcome.replicates.items()},
        "evidence": dict(outcome.evidence),
        "note": outcome.note,
        "warnings": warnings,
        "degraded": dict(run.host.muted),
        "versions": _versions(),
        "plugins": [
            {"name": o.plugin, "distribution": o.distribution, "version": o.version} for o in run.host.origins.values()
        ],
        "recipe": run.recipe.model_dump(mode="json"),
    }


def _below(student: dict[str, Any] | None, control: dict[str, Any] | None, images: int) -> list[str]:
    """A student that ends more than two standard errors below its label-only control was harmed by its teacher."""
    if student is None or control is None:
        return []
    own, other = student["monitor_accuracy"], control["monitor_accuracy"]
    error = math.sqrt((own * (1 - own) + other * (1 - other)) / images)
    if other - own <= 2 * error:
        return []
    return [f"the student ends at {own:.2%} on the monitor split, its label-only control at {other:.2%}"]


def placed(run: Run, key: str) -> dict[str, Any]:
    """A stage's place in the plan; names are this run's, its result may be another's."""
    stage = run.stages[key]
    return {
        "key": key,
        "name": stage.name,
        "seed": run.recipe.seed if stage.seed is None else stage.seed,
        "controllers": [spec.name.rpartition("/")[2] for spec in stage.controllers],
        "inputs": {role: _link(run, m.init) for role, m in stage.members.items() if m.init is not None},
        "uses": {name: _link(run, ref) for name, ref in stage.uses.items()},
    }


def asked(run: Run, key: str) -> dict[str, Any]:
    """What is known of a stage before it begins: its place, and who is in it."""
    stage = run.stages[key]
    members = {role: {"model": str(m.model), "trained": bool(m.terms)} for role, m in stage.members.items()}
    return {**placed(run, key), "length": stage.length, "members": members}


def _link(run: Run, ref: ResultRef) -> dict[str, str]:
    assert isinstance(ref.stage, Stage)
    return {"stage": run.keys.of(ref.stage), "member": ref.member}


def _member(run: Run, ref: ResultRef | None) -> dict[str, Any] | None:
    if ref is None:
        return None
    link = _link(run, ref)
    member = run.results[link["stage"]]["members"][ref.member]
    kept = ("model", "test_accuracy", "monitor_accuracy", "test_accuracy_last", "monitor_accuracy_last",
            "best_monitor_accuracy", "test_accuracy_at_best", "params", "flops", "latency_ms")  # fmt: skip
    return {**{name: member[name] for name in kept}, **link}


def chosen(run: Run, choice: Choice) -> dict[str, Any]:
    """A choice as its event and result.json have it; ``best`` is the student to deliver if the run ended there."""
    numbers = {"margin": _known(choice.margin), "error": _known(choice.error)}
    return {"text": choice.text, **numbers, "is_noise": choice.is_noise, "best": _link(run, choice.best)}


def _known(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _replicate(run: Run, ref: ResultRef) -> dict[str, Any]:
    member = _member(run, ref)
    assert member is not None
    return {**member, "seed": run.results[member["stage"]]["seed"]}


def _seeds(run: Run, outcome: Outcome) -> list[int]:
    """Of the stages that are reported: the student's, or those of its replicates."""
    refs = [ref for refs in outcome.replicates.values() for ref in refs] or [outcome.student]
    return sorted({run.results[_link(run, ref)["stage"]]["seed"] for ref in refs})


def _chain(student: ResultRef) -> list[ResultRef]:
    """From the first teacher to the student: each learner's teacher is the member that it started its terms from."""
    chain = [student]
    while (teacher := _teacher(chain[0])) is not None:
        chain.insert(0, teacher)
    return chain


def _teacher(ref: ResultRef) -> ResultRef | None:
    assert isinstance(ref.stage, Stage)
    for term in ref.stage.members[ref.member].terms:
        source = ref.stage.members.get(term.source or "")
        if source is not None and source.init is not None:
            return source.init
    return None


def _control(student: ResultRef) -> ResultRef | None:
    assert isinstance(student.stage, Stage)
    if CONTROL in student.stage.uses:
        return student.stage.uses[CONTROL]
    return student.stage[CONTROL] if CONTROL in student.stage.members else None


def _protocol(run: Run, outcome: Outcome) -> dict[str, Json]:
    spec = run.view.data
    splits = run.context.load(spec)
    keep = run.recipe.train.keep
    sizes = {"train": len(splits.train), "monitor": len(splits.monitor), "test": len(splits.test)}
    origin = "held out from the training data" if splits.carved else "that is no part of the training data"
    chosen = "the last epoch's weights" if keep == "last" else "the weights that were best on the monitor split"
    return {
        "selection": keep,
        "train_images": sizes["train"],
        "monitor_images": sizes["monitor"],
        "monitor_share": spec.monitor if splits.carved else None,
        "test_images": sizes["test"],
        "split_seed": spec.split_seed,
        "fingerprint": splits.fingerprint,
        "seeds": _seeds(run, outcome),
        "text": (
            f"Reported are {chosen}, trained on {sizes['train']} images. Every decision was made on a monitor split "
            f"of {sizes['monitor']} images {origin}; the {sizes['test']} test images decided nothing."
        ),
    }


def _versions() -> dict[str, str]:
    found = {"kdcore": __version__, "python": platform.python_version(), "platform": sys.platform}
    for name in ("torch", "torchvision", "numpy", "pluggy", "pydantic", "safetensors", "scikit-learn", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
