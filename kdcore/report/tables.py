"""Tables of what a run cost, what was decided between its stages, and what made it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..chains import Table, chains, directs
from ..costs import Costs, Work, costs
from .curves import number
from .formats import NONE, count, counted, scaled, seconds, signed_points, spread, weight
from .parts import Grid, grid

STEP = "three forward passes' FLOPs for each image of a step, and the time of that work."


def choices(found: Iterable[Table]) -> Grid:
    """What a strategy decided between its results; margins in points of monitor accuracy.

    Args:
        found: with text, margin and error; as in result.json, or as lines of metrics.jsonl.
    """
    rows = [(c["text"], _margin(c), weight(c["margin"], c["error"]) or NONE) for c in found]
    return grid("Choices between results", ("Choice", "Margin, points", "Weight"), "text num text", rows)


def _margin(choice: Table) -> str:
    error = number(choice["error"])
    return signed_points(choice["margin"]) + ("" if error is None else f"\u00a0±\u00a0{100 * error:.2f}")


def replicates(result: Table) -> Grid:
    """Every learner that the strategy names, over its seeds, beside the direct student under the same controllers."""
    gains, chosen = _gains(result), (result["student"]["stage"], result["student"]["member"])
    rows = []
    for name, refs in result["replicates"].items():
        ends = [(ref["stage"], ref["member"]) for ref in refs]
        accuracies = [spread([ref[key] for ref in refs]) for key in ("test_accuracy", "monitor_accuracy")]
        above = spread([gains.get(end) for end in ends], signed_points)
        seeds = ", ".join(str(ref["seed"]) for ref in refs)
        rows.append((name + " (chosen)" * (chosen in ends), seeds, *accuracies, above))
    heads = ("Learner", "Seeds", "Test accuracy", "Monitor accuracy", "Test, above direct")
    return grid("Learners over seeds", heads, "text text num num num", rows)


def _gains(result: Table) -> dict[tuple[str, str], float]:
    """How much higher the test accuracy of a chain's learner is than that of the direct one."""
    tests = {
        (stage["key"], role): number(member["test_accuracy"])
        for stage in result["stages"]
        for role, member in stage["members"].items()
    }
    found = directs(chains(result["stages"])).items()
    pairs = ((end, tests[end], tests[direct]) for end, direct in found)
    return {end: own - other for end, own, other in pairs if own is not None and other is not None}


def costs_by_role(result: Table) -> Grid:
    """What all stages cost by what they were for, and what was saved; each with how it was obtained."""
    found = costs(result)
    skipped = f"; skipped: {counted(found.chains_skipped, 'chain')}" if found.chains_skipped else ""
    works = [
        (f"All stages: {found.trained} trained, {found.reused} reused", found.total,
         f"Sums over the stages, whenever they were trained{skipped}. FLOPs are those of training steps."),
        ("First teachers", found.first_teachers, "Training of the models at which chains begin; none if given."),
        ("Students and assistants", found.students, f"Training of the learners: {STEP}"),
        ("Controls", found.controls, "Training on labels alone of what controllers compare with, each control once."),
        ("Teachers' forward passes", found.teachers, "One for each image while others learned from them."),
        ("Evaluation, data, checkpoints", Work(0, found.rest), "Time of the stages less their members' time in steps."),
        (f"Saved by stopping, in {counted(found.stages_stopped, 'stage')}", found.stopping,
         "Passes over the images that a learner was trained on after the stop: of its teacher, and of a control in "
         "the same stage. Time is at the seconds an image that each took before."),
        (f"Saved by sharing {counted(found.stages_shared, 'stage')}", found.sharing,
         "What chains would cost if each trained all its models, and each stage its own control to the end, less "
         "these stages."),
    ]  # fmt: skip
    rows = [(name, scaled(work.flops) if work.flops else NONE, seconds(work.seconds), how)
            for name, work, how in works if work != Work()]  # fmt: skip
    heads = ("", "FLOPs", "Time", "How it was obtained")
    return grid("Cost and savings", heads, "text num num long", [*rows, *_ratios(found)])


def _ratios(found: Costs) -> Iterator[tuple[str, str, str, str]]:
    if found.overhead is not None:
        how = "Stages with controllers and their controls, over the same stages without controls and without stops."
        yield "Overhead of controllers", _times(found.overhead), NONE, how
    if found.clock is not None:
        how = (
            "Time of these chains' distilled stages and controls, over that of the same chains without controllers, "
            "which share their stages too."
        )
        yield "The same by the clock", NONE, _times(found.clock), how
    if found.plain_alone.flops and found.plain_alone.seconds:
        flops, time = found.guided.flops / found.plain_alone.flops, found.guided.seconds / found.plain_alone.seconds
        how = (
            "The chains with controllers, their first teachers and controls, each stage once, over the same chains "
            "without controllers if each trained all its models."
        )
        yield "Sharing, against chain by chain", _times(flops), _times(time), how


def _times(ratio: float) -> str:
    return f"{ratio:.2f}\u00a0×"


def stages(result: Table) -> Grid:
    """What each stage cost."""
    rows = []
    for s in result["stages"]:
        flops = ", ".join(f"{role} {scaled(value)}" for role, value in s["flops"].items()) or NONE
        rate, origin = count(s["images_per_second"]), "reused" if s["reused"] else "trained"
        rows.append((s["name"], seconds(s["seconds"]), count(s["steps"]), rate, flops, origin))
    new = [number(s["seconds"]) or 0.0 for s in result["stages"] if not s["reused"]]
    all_of_them = sum(number(s["seconds"]) or 0.0 for s in result["stages"])
    rows.append(("All stages, when they were trained", seconds(all_of_them), "", "", "", ""))
    here = f"{len(new)} of {counted(len(result['stages']), 'stage')}"
    rows.append(("Trained in this run", seconds(sum(new)), "", "", "", here))
    heads = ("Stage", "Time", "Steps", "Images / s", "FLOPs by member", "Result")
    return grid("Cost of each stage", heads, "text num num num long text", rows)


def versions(result: Table) -> list[Grid]:
    """What made the result."""
    rows = [(p["name"], p["distribution"] or NONE, p["version"] or NONE) for p in result["plugins"]]
    machines: dict[str, list[str]] = {}
    for stage in result["stages"]:
        text = ", ".join(f"{key} {value}" for key, value in stage["environment"].items())
        machines.setdefault(text, []).append(stage["name"])
    return [
        grid("Versions", ("Part", "Version"), "text text", result["versions"].items()),
        grid("Plugins", ("Plugin", "Distribution", "Version"), "text text text", rows),
        grid("Machine", ("Stages", "Environment"), "text long", [("; ".join(v), k) for k, v in machines.items()]),
    ]
