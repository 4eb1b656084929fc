"""What a run cost, and what stopping and sharing saved, out of result.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal, TypeAlias

from .chains import CONTROL, Chain, Table, chains, learners, stop, teachers, whole

Role: TypeAlias = Literal["teachers", "students", "controls", "first_teachers"]
Stages: TypeAlias = dict[str, Table]
TRAINED = 3  # a training step counts as three forward passes


@dataclass(frozen=True)
class Work:
    """FLOPs of training, and the seconds that they took."""

    flops: int = 0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.seconds + other.seconds)


@dataclass(frozen=True)
class Costs:
    """What all stages of a run cost when they were trained, in this run or in the one whose result is reused.

    Args:
        trained: stages trained in this run.
        reused: stages whose results were in the store.
        chains_skipped: chains that the strategy says it did not train.
        teachers: forward passes of frozen members that others learned from.
        students: training of every learner that is none of the following, assistants included.
        controls: training of controls, in stages of their own and side by side.
        first_teachers: training of the models at which chains begin.
        rest: seconds of the stages outside their members' work: data, evaluation, checkpoints.
        stages_stopped: stages in which a decision ended the distillation.
        stopping: work that these did not do: forward passes of teachers, and training of controls side by side.
        stages_shared: how many stages more the chains would train if each trained all its models, the first teacher
            included, and each distilled stage its own control.
        sharing: what these stages would cost.
        overhead: FLOPs of the distilled stages with controllers and of their controls, over those of the same stages
            without controls and without stops; None without controllers.
        clock: seconds of the distilled stages with controllers and of their controls, over those of the same chains
            without, where the run has both; else None. First teachers, which both share, are in neither.
    """

    trained: int
    reused: int
    chains_skipped: int
    teachers: Work
    students: Work
    controls: Work
    first_teachers: Work
    rest: float
    stages_stopped: int
    stopping: Work
    stages_shared: int
    sharing: Work
    overhead: float | None
    clock: float | None

    @property
    def total(self) -> Work:
        """Of all stages."""
        return self.teachers + self.students + self.controls + self.first_teachers + Work(0, self.rest)


def costs(result: Table) -> Costs:
    """Adds up the stages of a result.

    Args:
        result: the content of result.json.
    """
    stages = {stage["key"]: stage for stage in result["stages"]}
    by_role: dict[Role, Work] = dict.fromkeys(("teachers", "students", "controls", "first_teachers"), Work())
    for role, work in _by_role(stages.values()):
        by_role[role] += work
    working = _sum(by_role.values()).seconds
    reused = sum(bool(stage["reused"]) for stage in stages.values())
    found = whole(result)
    more, sharing = _sharing(stages, found)
    return Costs(
        trained=len(stages) - reused,
        reused=reused,
        chains_skipped=int(_finite(result["evidence"].get("chains_skipped"))),
        **by_role,
        rest=_seconds(stages, stages) - working,
        stages_stopped=sum(bool(learners(s)) and stop(s) is not None for s in stages.values()),
        stopping=_sum(_missed(s, teachers(s), 1) + _missed(s, _beside(s), TRAINED) for s in stages.values()),
        stages_shared=more,
        sharing=sharing,
        overhead=_overhead(stages),
        clock=_clock(stages, found),
    )


def _sum(works: Iterable[Work]) -> Work:
    return reduce(add, works, Work())


def _member(stage: Table, role: str) -> Work:
    return Work(int(_finite(stage["flops"].get(role))), _finite(stage["member_seconds"].get(role)))


def _stage(stage: Table) -> Work:
    return Work(_sum(_member(stage, role) for role in stage["members"]).flops, _finite(stage["seconds"]))


def _finite(value: Any) -> float:
    """The value if it is a finite number, else 0: a generator has no FLOPs."""
    return value if isinstance(value, int | float) and math.isfinite(value) else 0


# ---------------------------------------------------------------- by role


def _by_role(stages: Collection[Table]) -> Iterator[tuple[Role, Work]]:
    """The work of every member of every stage, each once."""
    first = {(chain.links[0].stage, chain.links[0].member) for chain in chains(stages)}
    controls = {(ref["stage"], ref["member"]) for stage in stages for ref in [stage["uses"].get(CONTROL)] if ref}
    for stage in stages:
        for role, member in stage["members"].items():
            beside = role == CONTROL and bool(teachers(stage))
            if (stage["key"], role) in first:  # one that is a control too would be trained anyway
                yield "first_teachers", _member(stage, role)
            elif not member["trained"]:
                yield "teachers", _member(stage, role)
            else:
                control = beside or (stage["key"], role) in controls
                yield "controls" if control else "students", _member(stage, role)


# ---------------------------------------------------------------- saved by stopping


def _missed(stage: Table, roles: Iterable[str], passes: int) -> Work:
    """What members of a stopped stage would have done at so many passes over each image that the learner was trained
    on, less what they did.
    """
    images = max((_images(stage, role, TRAINED) for role in learners(stage)), default=0)
    if stop(stage) is None or not images:
        return Work()
    return _sum(_left(stage, role, images, passes) for role in roles)


def _left(stage: Table, role: str, images: int, passes: int) -> Work:
    did = _images(stage, role, passes)
    left = max(images - did, 0)
    each = _member(stage, role).seconds / did if did else 0.0
    return Work(left * passes * _forward(stage, role), left * each)


def _images(stage: Table, role: str, passes: int) -> int:
    """On which a member did its work, at so many forward passes each."""
    forward = _forward(stage, role)
    return _member(stage, role).flops // (passes * forward) if forward else 0


def _forward(stage: Table, role: str) -> int:
    """FLOPs of one image forward."""
    return int(_finite(stage["members"][role]["flops"]))


def _beside(stage: Table) -> list[str]:
    """The control that is trained in the same stage, if there is one."""
    return [CONTROL] if CONTROL in stage["members"] and learners(stage) else []


# ---------------------------------------------------------------- saved by sharing


def _sharing(stages: Stages, found: Iterable[Chain]) -> tuple[int, Work]:
    """How many stages, and what work, these chains would train beyond their stages once."""
    alone: Counter[str] = Counter()
    for keys in {tuple(link.stage for link in chain.links) for chain in found}:
        alone.update([*keys, *_controls(stages, keys)])
    again = {key: times - 1 for key, times in alone.items()}
    works = {key: _stage(stages[key]) for key in again}
    seconds = math.fsum(works[key].seconds * times for key, times in again.items())
    return sum(again.values()), Work(sum(works[key].flops * times for key, times in again.items()), seconds)


def _controls(stages: Stages, keys: Iterable[str]) -> list[str]:
    """Keys of the stages of their controls, as often as they are used."""
    used = [stages[key]["uses"].get(CONTROL) for key in keys]
    return [ref["stage"] for ref in used if ref is not None]


# ---------------------------------------------------------------- ratios


def _overhead(stages: Stages) -> float | None:
    guided = [stage for stage in stages.values() if stage["controllers"] and learners(stage)]
    controls = set(_controls(stages, [stage["key"] for stage in guided]))
    beside = _sum(_member(stage, role) for stage in guided for role in _beside(stage))
    own = _sum(_stage(stage) for stage in guided).flops
    plain = own - beside.flops + _sum(_missed(stage, teachers(stage), 1) for stage in guided).flops
    return (own + _sum(_stage(stages[key]) for key in controls).flops) / plain if plain else None


def _clock(stages: Stages, found: Iterable[Chain]) -> float | None:
    guided: dict[tuple[tuple[str, ...], int], set[str]] = {}
    plain: dict[tuple[tuple[str, ...], int], set[str]] = {}
    for chain in found:
        variant = guided if chain.controllers else plain
        variant.setdefault((chain.models, chain.seed), set()).update(chain.distilled)
    both = guided.keys() & plain.keys()
    with_them = {key for pair in both for key in guided[pair]}
    without = {key for pair in both for key in plain[pair]}
    under = _seconds(stages, without)
    return _seconds(stages, with_them | set(_controls(stages, with_them))) / under if under else None


def _seconds(stages: Stages, keys: Iterable[str]) -> float:
    return math.fsum(_stage(stages[key]).seconds for key in keys)
