"""Made-up stages of a result.json, for tests of what is computed from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FORWARD = {"mlp-10": 100, "mlp-8": 80, "mlp-6": 60, "mlp-4": 40, "mlp-2": 20}
"""FLOPs of one image."""
IMAGES = 1000
"""Of all epochs of a stage."""
CURVE = ({"tick": 1, "epoch": 1.0, "accuracy": 0.5}, {"tick": 2, "epoch": 2.0, "accuracy": 0.9})


def member(model: str, trained: bool = True, accuracy: float = 0.9, curve: Sequence[Any] = CURVE) -> dict[str, Any]:
    accuracies = ("monitor_accuracy", "test_accuracy", "monitor_accuracy_last", "test_accuracy_last",
                  "best_monitor_accuracy", "test_accuracy_at_best")  # fmt: skip
    return {
        "model": model, "trained": trained, "params": 10 * FORWARD.get(model, 1), "flops": FORWARD.get(model, 1),
        "latency_ms": 1.0, "best_tick": 1, "curve": list(curve) if trained else [],
        **dict.fromkeys(accuracies, accuracy),
    }  # fmt: skip


def stage(key: str, members: Mapping[str, Any], images: Mapping[str, int], **more: Any) -> dict[str, Any]:
    """Takes a second for each 100 images of a member, and one beside its members' work."""
    passes = {role: images[role] * (3 if m["trained"] else 1) for role, m in members.items()}
    own = {role: images[role] / 100 for role in members}
    return {
        "key": key, "name": key, "seed": 0, "controllers": [], "length": 2, "tick": "epoch", "ticks": 2, "steps": 20,
        "step": "distill", "seconds": sum(own.values()) + 1, "images_per_second": 100.0, "reused": False,
        "members": dict(members), "inputs": {}, "uses": {}, "events": [], "warnings": [], "environment": {},
        "member_seconds": own, "flops": {role: passes[role] * (m["flops"] or 0) for role, m in members.items()}, **more,
    }  # fmt: skip


def on_labels(key: str, model: str, role: str = "teacher", **more: Any) -> dict[str, Any]:
    return stage(key, {role: member(model)}, {role: IMAGES}, **more)


def distilled(
    key: str, model: str, teacher: Mapping[str, Any], stopped: int | None = None, control: str = "", **more: Any
) -> dict[str, Any]:
    """A learner of another stage's model; ``stopped`` is after how many images, ``control`` the key of a stage or
    "beside".
    """
    role = "student" if "student" in teacher["members"] else "teacher"
    members = {"student": member(model), "teacher": member(teacher["members"][role]["model"], trained=False)}
    until = IMAGES if stopped is None else stopped
    images = {"student": IMAGES, "teacher": until}
    if control == "beside":
        members["control"], images["control"] = member(model), until
    head = {"tick": 1, "epoch": 1.0, "step": 10, "controller": "dskd", "reason": "made up"}
    events = [{**head, "kind": "set", "target": "student.kd.weight", "value": 0.0}] if stopped is not None else []
    uses = {"control": {"stage": control, "member": "control"}} if control not in ("", "beside") else {}
    more = {"controllers": ["dskd"] if control else [], "events": events, "uses": uses, **more}
    return stage(key, members, images, inputs={"teacher": {"stage": teacher["key"], "member": role}}, **more)


def result(stages: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """What chains and costs read of a result; the last stage's student is delivered."""
    end = stages[-1]
    role = "student" if "student" in end["members"] else next(iter(end["members"]))
    student = {"stage": end["key"], "member": role, "model": end["members"][role]["model"]}
    return {"stages": list(stages), "student": student, "replicates": {}, "evidence": {}, **more}
