"""What a run of several chains found: the tree of its chains, their curves, and those of each step of distillation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from markupsafe import Markup

from ..chains import Chain, Link, Table, chains, chosen, groups, label, whole
from . import figures, tree
from .averages import Variant, variants
from .curves import number, unit
from .formats import NONE, counted, percent, place, spread
from .parts import Grid, Panel, grid

WIDEST, TALLEST = 6, 24  # models side by side, and one above the other, whose names are readable on 1280 pixels
SETTLED = 0.25
"""The share of the places that the axis of accuracies leaves out: the first rise would flatten what is compared."""


@dataclass(frozen=True)
class Compared:
    """One learner with each choice of controllers."""

    title: str
    variants: tuple[Variant, ...]
    unit: str
    ratio: float = 0.0


def is_study(result: Table) -> bool:
    """True for a run of more than one chain."""
    return len(whole(result)) > 1


# ---------------------------------------------------------------- the tree of chains


def tree_panels(result: Table) -> list[tuple[str, int, Panel]]:
    """The chains with the chosen one's controllers, across a wide page and down a narrow one."""
    nodes, controllers = _nodes(result)
    said = "; ".join(_said(nodes, i) for i in range(len(nodes)))
    note = (
        "Test accuracy of each model, mean and standard deviation if it has several seeds. An arrow is a distillation, "
        f"with the mean {unit(result['stages'][-1])} at which it stopped: (1/3) if it did in one stage of three. The "
        "chosen chain is bold."
    )
    if any(chain.controllers != controllers for chain in whole(result)):
        note += f" Drawn are the chains {'with ' + ' + '.join(controllers) if controllers else 'without controllers'}."
    wide = tree.columns(nodes) <= WIDEST and tree.leaves(nodes) <= TALLEST
    found = []
    for css, draw in (("across", tree.across), ("down", tree.down)) if wide else (("tall", tree.down),):
        svg = draw(f"tree-{css}", said, nodes)
        found.append((css, tree.columns(nodes), Panel("Chains from the teacher to the student", Markup(svg), (), note)))
    return found


def _nodes(result: Table) -> tuple[list[tree.Node], tuple[str, ...]]:
    """The nodes, teachers first, and the controllers of the chains that they are of."""
    found = chains(result["stages"])
    best = chosen(result, found) or whole(result)[0]
    stages = {stage["key"]: stage for stage in result["stages"]}
    nodes: list[tree.Node] = []
    places: dict[Link, int] = {}

    def add(links: Sequence[Link], parent: int | None) -> None:
        old = [places[link] for link in links if link in places]
        places.update(dict.fromkeys(links, old[0] if old else len(nodes)))
        if not old:
            nodes.append(_node(stages, links, parent, bool(set(links) & set(best.links))))

    for group in sorted(groups(_like(best, found)), key=lambda group: len(group.models)):
        add(list(dict.fromkeys(chain.links[0] for chain in group.chains)), None)
        add([chain.end for chain in group.chains], places[group.chains[0].links[-2]])
    return nodes, best.controllers


def _like(best: Chain, found: Sequence[Chain]) -> list[Chain]:
    """The chains with the same controllers, and those that they go on."""
    same = [chain for chain in found if chain.controllers == best.controllers]
    begun = {chain.links[:end] for chain in same for end in range(2, len(chain.links))}
    return [chain for chain in found if chain.controllers == best.controllers or chain.links in begun]


def _node(stages: Table, links: Sequence[Link], parent: int | None, is_chosen: bool) -> tree.Node:
    members = [stages[link.stage]["members"][link.member] for link in links]
    accuracy = spread([member["test_accuracy"] for member in members])
    stopped = "" if parent is None else _stopped([(stages[link.stage], link.member) for link in links])
    return tree.Node(links[0].model, accuracy, parent, stopped, is_chosen)


def _stopped(found: Sequence[tuple[Table, str]]) -> str:
    """The mean place of the stop, and in how many of the stages there was one if not in all."""
    (one,) = variants(((), stage, member) for stage, member in found)
    if not one.stops:
        return "no stop"
    some = "" if len(one.stops) == one.stages else f" ({len(one.stops)}/{one.stages})"
    return f"stop {place(mean(one.stops))}{some}"


def _said(nodes: Sequence[tree.Node], i: int) -> str:
    """A node in words, with all that it learned from."""
    node, models, above = nodes[i], [nodes[i].model], nodes[i].parent
    while above is not None:
        models.insert(0, nodes[above].model)
        above = nodes[above].parent
    stopped = f", {node.stopped}" if node.stopped else ""
    return f"{label(models) if len(models) > 1 else node.model}: {node.accuracy}{stopped}{', chosen' * node.chosen}"


# ---------------------------------------------------------------- curves


def chain_panels(result: Table) -> list[Panel]:
    """A figure a chain: its student with and without controllers, the chosen chain first."""
    stages = {stage["key"]: stage for stage in result["stages"]}
    best = chosen(result, whole(result))
    found: dict[tuple[str, ...], list[Chain]] = {}
    for chain in whole(result):
        found.setdefault(chain.models, []).append(chain)
    compared = []
    for models, same in sorted(found.items(), key=lambda item: best not in item[1]):
        ends = [(chain.controllers, stages[chain.end.stage], chain.end.member) for chain in same]
        title = label(models) + " (chosen)" * (best in same)
        compared.append(Compared(title, variants(ends), unit(ends[0][1])))
    return _panels("chain", compared)


def steps(result: Table) -> list[Compared]:
    """Every step from one model to another, whatever chain it stands in, near sizes first."""
    stages = {stage["key"]: stage for stage in result["stages"]}
    found: dict[tuple[str, str], list[tuple[tuple[str, ...], Table, str]]] = {}
    ratios: dict[tuple[str, str], float] = {}
    for chain in chains(result["stages"]):
        (over, own), stage = chain.links[-2:], stages[chain.end.stage]
        found.setdefault((over.model, own.model), []).append((tuple(stage["controllers"]), stage, own.member))
        sizes = [number(stages[link.stage]["members"][link.member]["params"]) or 0 for link in (over, own)]
        ratios.setdefault((over.model, own.model), sizes[0] / sizes[1] if sizes[1] else 0.0)
    compared = [
        Compared(" -> ".join(pair), variants(same), unit(same[0][1]), ratios[pair]) for pair, same in found.items()
    ]
    return sorted(compared, key=lambda one: one.ratio)


def step_panels(found: Sequence[Compared]) -> list[Panel]:
    """A figure a step."""
    return _panels("step", found)


def _panels(name: str, found: Sequence[Compared]) -> list[Panel]:
    drawn = [one for one in found if all(len(v.series.points) > 1 for v in one.variants)]
    if not drawn:
        return []
    every = [v for one in drawn for v in one.variants]
    last = max(x for v in every for x, _, _ in v.band)
    settled = [(low, high) for v in every for x, low, high in v.band if x > SETTLED * last]
    least, most = min(low for low, _ in settled), max(high for _, high in settled)
    room = 0.05 * (most - least) or 0.01
    limits = (least - room, most + room)
    return [_panel(f"{name}-{i}", one, limits, last) for i, one in enumerate(drawn, 1)]


def _panel(name: str, one: Compared, limits: tuple[float, float], last: float) -> Panel:
    title = f"{one.title}: " + ", ".join(f"{percent(v.final)} {v.name}" for v in one.variants)
    said = "; ".join(_curve(v, one.unit) for v in one.variants)
    svg = figures.averages(name, f"Monitor accuracy, {one.title}: {said}", one.variants, limits, last, one.unit)
    return Panel(title, Markup(svg), tuple(v.series for v in one.variants), _ended(one))


def _ended(one: Compared) -> str:
    """In how many of the stages distillation stopped, and where: a line is drawn for those alone."""
    said = [
        f"in {len(v.stops)} of {counted(v.stages, 'stage')} {v.name}, "
        f"at {one.unit} {', '.join(map(place, sorted(v.stops)))}"
        for v in one.variants
        if v.stops
    ]
    return f"Distillation stopped {'; '.join(said)}." if said else "Distillation never stopped."


def _curve(one: Variant, axis: str) -> str:
    ends = ", ".join(map(place, one.stops))
    stopped = f", stopped at {axis} {ends}" if ends else ""
    return f"{one.name} {percent(one.final)} at the end, mean of {one.stages}{stopped}"


def convergence(found: Iterable[Compared]) -> Grid:
    """How soon each step of distillation comes near its end, and when it stopped."""
    rows = [
        (one.title, f"{one.ratio:.3g}\u00a0×", v.name, str(v.stages), _converged(v, one.unit), _share(v))
        for one in found
        for v in one.variants
    ]
    heads = ("Step", "Teacher / learner", "Variant", "Stages", "Near its end at", "Stopped after, of its length")
    return grid("Convergence of each step of distillation", heads, "text num text num num num", rows)


def _converged(one: Variant, unit: str) -> str:
    return NONE if one.converged is None else f"{unit}\u00a0{place(one.converged)}"


def _share(one: Variant) -> str:
    some = "" if len(one.stops) == one.stages else f" ({len(one.stops)} of {one.stages})"
    return NONE if one.share is None else f"{100 * one.share:.0f}\u00a0%{some}"
