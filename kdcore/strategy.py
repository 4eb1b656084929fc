"""A strategy's generator: started, and what it yields and returns checked; what it is told of a result."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from .errors import PlanError, PluginError
from .plan import MemberResult, Outcome, Result, Spec, Stage
from .plugins import PluginHost
from .runview import RunView


def start(strategy: Spec, view: RunView, host: PluginHost) -> Any:
    """The strategy's generator, not yet started."""
    entry = host.catalog.find("strategy", strategy.name)
    options = entry.options_class()(**strategy.options)
    plan = entry.load()().plan(view, options)
    if not hasattr(plan, "send"):
        raise PluginError("plan() is not a generator", where=f"strategy {entry.full_name!r}", fix="yield stages.")
    return plan


def check_stages(wanted: Any, strategy: Spec) -> list[Stage]:
    """What a strategy yielded, as a list of stages."""
    stages = wanted if isinstance(wanted, list) else [wanted]
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        fix = "Yield a Stage, a list of some, or a Choice."
        raise PlanError(f"yielded {wanted!r}", where=f"strategy {strategy.name!r}", fix=fix)
    return stages


def check_outcome(value: Any, strategy: Spec) -> Outcome:
    """What a strategy returned."""
    if not isinstance(value, Outcome) or not isinstance(value.student.stage, Stage):
        raise PlanError(f"returned {value!r}", where=f"strategy {strategy.name!r}", fix="Return an Outcome.")
    return value


def view_result(stage: Stage, data: Mapping[str, Any]) -> Result:
    """A stage's result without anything that was measured on the test split."""
    members = {
        name: MemberResult(
            ref=stage[name],
            accuracy=_number(member["monitor_accuracy"]),
            best_accuracy=_number(member["best_monitor_accuracy"]),
            curve=tuple(member["curve"]),
            params=member["params"],
            flops=member["flops"] or 0,
            correct=_unpacked(member),
            diverged=member.get("diverged") is True,
        )
        for name, member in data["members"].items()
    }
    flops = sum(data["flops"].values())
    return Result(stage, data["key"], members, tuple(data["events"]), data["seconds"], flops)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _unpacked(member: Mapping[str, Any]) -> bytes:
    """What result.json says of each monitor image, a byte an image."""
    import numpy as np

    packed = np.frombuffer(base64.b64decode(member["monitor_correct"]), np.uint8)
    return np.unpackbits(packed, count=member["monitor_images"]).tobytes()
