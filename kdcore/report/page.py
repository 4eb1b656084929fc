"""The view of a result: every number formatted, every table and figure ready, in the order of the page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..chains import Table
from . import curves, figures, study, tables
from .curves import Series, Stop, member_series, number, places, position, share_series, shown, stops, unit
from .formats import NONE, count, counted, milliseconds, percent, ratio, scaled, seconds
from .parts import Grid, Panel, grid

ROLES = ("student", "teacher", "control")
ACROSS = 5  # models side by side whose names are readable on 1280 pixels
MOST_DRAWN = 40  # stages, whose figures take about 0.13 s and 40 kB each
NOT_DRAWN = "In a run of so many stages only those of the chosen chain are drawn; curves.csv has every curve."


@dataclass(frozen=True)
class StageView:
    """A stage as the page shows it; one that leads to the student is open from the start. ``without`` is said where
    there are no figures.
    """

    name: str
    about: str
    on_chain: bool
    members: Grid
    panels: tuple[Panel, ...]
    without: str


def view(result: Table) -> dict[str, Any]:
    """Everything that the template shows."""
    return {
        "title": f"{result['student']['model']}: {percent(_reported(result, 'student'))} test accuracy",
        "lede": lede(result),
        "run": _run(result),
        "warnings": _warnings(result),
        "of_seed": _of_seed(result),
        "headline": _headline(result),
        "protocol": _protocol(result),
        "chain": study.tree_panels(result) if study.is_study(result) else _chain(result),
        **_study(result),
        "stages": [_stage(result, stage, f"s{i}") for i, stage in enumerate(result["stages"], 1)],
        "decisions": decisions(result["stages"]),
        "cost": tables.costs_by_role(result),
        "stage_costs": tables.stages(result),
        "versions": tables.versions(result),
        "recipe": json.dumps(result["recipe"], indent=2, ensure_ascii=False),
    }


def _study(result: Table) -> dict[str, Any]:
    """What several chains, seeds and choices add to the page; empty where there is but one of each."""
    several = study.is_study(result)
    steps = study.steps(result) if several else []
    return {
        "choices": tables.choices(result["choices"]),
        "replicates": tables.replicates(result),
        "chain_curves": study.chain_panels(result) if several else [],
        "step_curves": study.step_panels(steps),
        "convergence": study.convergence(steps),
    }


def _reported_key(result: Table) -> str:
    return "test_accuracy_last" if result["protocol"]["selection"] == "last" else "test_accuracy_at_best"


def _reported(result: Table, role: str) -> float | None:
    return number((result[role] or {}).get("test_accuracy"))


def lede(result: Table) -> str:
    """What was found, in a sentence; empty where there is nothing to compare with."""
    own = _reported(result, "student")
    words = {"control": "its control (labels alone)", "teacher": "its teacher"}
    said = []
    for role, name in words.items():
        other = _reported(result, role)
        if own is not None and other is not None:
            gap, reach = own - other, _two_errors(own, other, result)
            within = f", which is within two standard errors (±{100 * reach:.2f})" if abs(gap) < reach else ""
            said.append(f"{abs(100 * gap):.2f} points {'above' if gap >= 0 else 'below'} {name}{within}")
    images = number(result["protocol"]["test_images"])
    where = f"On {count(images)} test images" if images else "On the test images"
    return f"{where} the student is {', and '.join(said)}." if said else ""


def _two_errors(own: float, other: float, result: Table) -> float:
    """Two standard errors of the difference of two shares of the test images, not paired by image; 0 if unknown."""
    images = number(result["protocol"]["test_images"])
    return 2 * math.sqrt((own * (1 - own) + other * (1 - other)) / images) if images else 0.0


def _objective(result: Table) -> str:
    """The student's objective in words, as the recipe has it."""
    said = [_term(term) for term in result["recipe"].get("objective", ())]
    return f"Objective: {' + '.join(said)}." if said else ""


def _term(term: Table) -> str:
    own = ("loss", "weight", "name", "warmup_epochs", "schedule")
    shown = [f"{key} {value}" for key, value in term.items() if key not in own and value is not None]
    shown += [f"warm-up {term['warmup_epochs']:g} epochs"] if term.get("warmup_epochs") else []
    schedule = term.get("schedule", {}).get("name", "constant")
    shown += [f"{schedule} schedule"] if schedule != "constant" else []
    return f"{term.get('weight', 1):g} x {term['loss']}" + (f" ({', '.join(shown)})" if shown else "")


def _run(result: Table) -> str:
    run = result["run"]
    facts = [f"Run {run['id']}", run["finished"], f"seed {run['seed']}", seconds(run["seconds"])]
    return " · ".join(str(fact) for fact in facts if fact is not None)


def _warnings(result: Table) -> list[str]:
    own = list(result["warnings"])
    degraded = [f"Plugin {name} is degraded: {reason}" for name, reason in result["degraded"].items()]
    staged = [f"{s['name']}: {text}" for s in result["stages"] for text in s["warnings"] if text not in own]
    return list(dict.fromkeys([*own, *degraded, *staged]))


def _of_seed(result: Table) -> str:
    """Which training the headline is of, where the delivered student was trained under several seeds."""
    end = result["student"]["stage"], result["student"]["member"]
    for refs in result["replicates"].values():
        seeds = {(ref["stage"], ref["member"]): ref["seed"] for ref in refs}
        if len(seeds) > 1 and end in seeds:
            return f"Of seed {seeds[end]} alone; the mean of all {len(seeds)} stands under Learners."
    return ""


def _headline(result: Table) -> Grid:
    members = [result[role] or {} for role in ROLES]
    student, teacher = members[0], members[1]
    shares = {
        "Test accuracy, last": "test_accuracy_last",
        "Test accuracy, best on monitor": "test_accuracy_at_best",
        "Monitor accuracy, last": "monitor_accuracy_last",
        "Monitor accuracy, best": "best_monitor_accuracy",
    }
    sizes = {"Parameters": ("params", count), "FLOPs": ("flops", scaled), "Latency": ("latency_ms", milliseconds)}
    rows = [("Model", *(m.get("model", NONE) for m in members), "")]
    for text, key in shares.items():
        mark = " (reported)" if key == _reported_key(result) else ""
        rows.append((text + mark, *(percent(m.get(key)) for m in members), ""))
    for text, (key, shown_as) in sizes.items():
        rows.append((text, *(shown_as(m.get(key)) for m in members), ratio(teacher.get(key), student.get(key))))
    heads = ("", "Student", "Teacher", "Control", "Teacher / student")
    return grid("Student, teacher and control", heads, "text num num num num", rows)


def _protocol(result: Table) -> list[str]:
    p = result["protocol"]
    chosen = "last weights" if p["selection"] == "last" else "best on the monitor images"
    carved = f"{percent(p['monitor_share'])} of the training data, split seed {p['split_seed']}"
    splits = (
        f"{count(p['train_images'])} training images, {count(p['monitor_images'])} monitor images "
        f"({'given' if p['monitor_share'] is None else carved}) and {count(p['test_images'])} test images"
    )
    seeds = ", ".join(str(seed) for seed in p["seeds"])
    said = [_objective(result), p["text"], f"Selection: {chosen}. Splits: {splits}. Seed: {seeds}."]
    said.append(_precision(result))
    return [text for text in said if text]


def _precision(result: Table) -> str:
    """What a difference on so many test images is to be read against."""
    images, own = number(result["protocol"]["test_images"]), _reported(result, "student")
    if not images or own is None:
        return ""
    others = {f"the {role}": other for role in ("control", "teacher") if (other := _reported(result, role)) is not None}
    others = others or {"one as accurate": own}
    said = " and ".join(
        f"±{100 * _two_errors(own, other, result):.2f} points from {name}" for name, other in others.items()
    )
    return (
        f"One test image is {100 / images:.2f} points. Two standard errors of the student's difference on this many "
        f"images, not paired by image, are {said}: a smaller one may be chance. Other seeds are not in them."
    )


def _chain(result: Table) -> list[tuple[str, int, Panel]]:
    """The same figure across a wide page and down a narrow one; a chain too long to read across goes down on both."""
    nodes = _nodes(result)
    said = [f"{n.role} {n.model}, {n.accuracy}" + (f", stopped at {n.stopped}" if n.stopped else "") for n in nodes]
    note, panels = "Test accuracy of each model; an arrow is a distillation.", []
    for css in ("across", "down") if len(nodes) <= ACROSS else ("tall",):
        if nodes:
            svg = figures.chain(css, "; then ".join(said), nodes, down=css != "across")
            panels.append((css, len(nodes), Panel("From teacher to student", Markup(svg), (), note)))
    return panels


def _nodes(result: Table) -> list[figures.Node]:
    stages = {stage["key"]: stage for stage in result["stages"]}
    links = [(stages[link["stage"]], link["member"]) for link in result["chain"] if link["stage"] in stages]
    nodes = []
    for i, (stage, name) in enumerate(links):
        role = "student" if i == len(links) - 1 else "assistant" if i else "teacher"
        member, stopped = stage["members"][name], stops(stage)
        at = f"{unit(stage)} {stopped[0].at:g}" if stopped and i else ""
        nodes.append(figures.Node(role, member["model"], percent(member.get("test_accuracy")), at))
    return nodes


def _stage(result: Table, stage: Table, name: str) -> StageView:
    names = {s["key"]: s["name"] for s in result["stages"]}
    facts = [f"step {stage['step']}", counted(stage["length"], unit(stage)), counted(stage["steps"], "step")]
    for role, ref in [*stage["inputs"].items(), *stage["uses"].items()]:
        facts.append(f"{role} from “{names.get(ref['stage'], ref['stage'][:12])}”")
    facts += [f"seed {stage['seed']}"] if len({s["seed"] for s in result["stages"]}) > 1 else []
    facts += ["reused" if stage["reused"] else "trained", f"key {stage['key'][:12]}"]
    on_chain = stage["key"] in {link["stage"] for link in result["chain"]}
    few = len(result["stages"]) <= MOST_DRAWN
    drawn = panels(result, stage, name) if on_chain or few else ()
    why = "No curves: fewer than two points." if on_chain or few else NOT_DRAWN
    return StageView(stage["name"], " · ".join(facts), on_chain, _members(result, stage), drawn, why)


def _members(result: Table, stage: Table) -> Grid:
    keys = ("monitor_accuracy_last", "best_monitor_accuracy", "test_accuracy_last", "test_accuracy_at_best")
    rows = []
    for role, member in shown(result, stage):
        origin = "another stage" if role not in stage["members"] else "trained" if member["trained"] else "frozen"
        last, best, *test = (percent(member.get(key)) for key in keys)
        tick = number(member.get("best_tick"))
        where = f"\u00a0({unit(stage)}\u00a0{position(stage, int(tick))})" if tick else ""
        rows.append((role, member["model"], origin, last, best + where, *test))
    heads = ("Member", "Model", "Weights", "Monitor, last", "Monitor, best", "Test, last", "Test, best on monitor")
    return grid(f"Accuracies in “{stage['name']}”", heads, "text text text num num num num", rows)


def panels(result: Table, stage: Table, name: str) -> tuple[Panel, ...]:
    """The figures of a stage; ``name`` begins their ids. Curves of other stages come from ``result``."""
    ends, axis = stops(stage), unit(stage)
    said = " ".join(f"Stopped at {axis} {s.at:g}: {s.reason.rstrip('.') or 'no reason given'}." for s in ends)
    found = []
    for title, key, note in (
        ("Monitor accuracy", "accuracy", ""),
        ("Train loss", "train.loss", "The whole weighted objective: heights compare only between equal objectives."),
    ):
        series = member_series(result, stage, key)
        if series:
            shares = key == "accuracy"
            label = _label(title, series, ends, axis, shares)
            svg = figures.lines(f"{name}-{key.replace('.', '-')}", label, series, ends, axis, shares)
            found.append(Panel(title, Markup(svg), tuple(series), f"{note} {said}".strip()))
    return (*found, *_share_panels(stage, name, ends, said), *_ledger_panels(stage, name, ends))


def _share_panels(stage: Table, name: str, ends: Sequence[Stop], said: str) -> Iterable[Panel]:
    note = (
        "Each term's share of the norm of the gradient at the logits on one fixed monitor batch; "
        "blank where it was not measured, as with one term alone."
    )
    for i, (role, member) in enumerate(stage["members"].items()):
        series = share_series(stage, role)
        if series:
            title = f"Gradient share: {role}"
            label = _label(title, series, ends, unit(stage), shares=True)
            svg = figures.bands(f"{name}-share-{i}", label, series, places(stage, member["curve"]), ends, unit(stage))
            yield Panel(title, Markup(svg), tuple(series), f"{note} {said}".strip())


def _ledger_panels(stage: Table, name: str, ends: Sequence[Stop]) -> Iterable[Panel]:
    """What a ledger holds: lines of norms, and of cosines where two terms act through the logits."""
    for i, role in enumerate(stage["members"]):
        left_out = curves.off_logits(stage, role)
        note = "Of the weighted terms' gradients at the logits on training batches, means over what was measured. "
        note += f"Not through the logits alone, so not here: {', '.join(left_out)}." if left_out else ""
        for title, key in (("Gradient norms", "norm"), ("Gradient cosines", "cosine")):
            series = curves.term_series(stage, role, f"train.{key}.")
            if series:
                label = _label(f"{title}: {role}", series, ends, unit(stage), shares=False)
                svg = figures.lines(f"{name}-{key}-{i}", label, series, ends, unit(stage), percent=False)
                yield Panel(f"{title}: {role}", Markup(svg), tuple(series), note.strip())


def _label(title: str, series: Sequence[Series], ends: Sequence[Stop], axis: str, shares: bool) -> str:
    def value(y: float) -> str:
        return percent(y) if shares else f"{y:.3g}"

    said = [f"{s.label} from {value(s.points[0][1])} to {value(s.points[-1][1])}" for s in series]
    return f"{title} over {axis}s: " + "; ".join([*said, *(f"stopped at {axis} {stop.at:g}" for stop in ends)])


def decisions(stages: Iterable[Table]) -> Grid:
    """What was decided while the stages ran."""
    rows = [
        (stage["name"], count(e["epoch"]), count(e["step"]), e["controller"], _decision(e), e["reason"] or NONE)
        for stage in stages
        for e in stage["events"]
    ]
    heads = ("Stage", "Epoch", "Step", "Controller", "Decision", "Reason")
    return grid("Decisions of controllers", heads, "text num num text text long", rows)


def _decision(event: Table) -> str:
    target, value = event["target"], event["value"]
    if event["kind"] == "pieces":
        return f"{target} in {value} pieces"
    return f"{target} = {json.dumps(value)}" if event["kind"] == "set" else f"{event['kind']} {target or ''}".strip()
