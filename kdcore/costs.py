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
            included, and each distilled stage its own control, of full length.
        sharing: what these stages would cost.
        overhead: FLOPs of the distilled stages with controllers and of their controls, over those of the same stages
            without controls and without stops; None without controllers.
        clock: seconds of the distilled stages with controllers and of their controls, over those of the same chains
            without, where the run has both; else None. First teachers, which both share, are in neither.
        guided: of the chains that the run has with controllers and without: first teachers, distilled stages and
            controls of those with them, each stage once.
        plain_alone: of these chains without controllers if each trained all its models, the first teacher included:
            plain distillation, chain by chain.
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
    guided: Work
    plain_alone: Work

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
    guided, plain = _both(found)
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
        clock=_clock(stages, guided, plain),
        guided=_once(stages, (key for chain in guided for key in chain.stages)),
        plain_alone=_sum(_stage(stages[key]) for chain in plain for key in chain.stages),
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
    for keys in {chain.stages for chain in found}:
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


def _both(found: Collection[Chain]) -> tuple[list[Chain], list[Chain]]:
    """The chains with controllers, and those without, of models and seeds that have both."""
    with_them = {(chain.models, chain.seed) for chain in found if chain.controllers}
    without = {(chain.models, chain.seed) for chain in found if not chain.controllers}
    same = [chain for chain in found if (chain.models, chain.seed) in with_them & without]
    return [chain for chain in same if chain.controllers], [chain for chain in same if not chain.controllers]


def _clock(stages: Stages, guided: Iterable[Chain], plain: Iterable[Chain]) -> float | None:
    over = _once(stages, (key for chain in guided for key in chain.distilled)).seconds
    under = _once(stages, (key for chain in plain for key in chain.distilled)).seconds
    return over / under if under else None


def _once(stages: Stages, keys: Iterable[str]) -> Work:
    """Of these stages and their controls, each once."""
    own = set(keys)
    return _sum(_stage(stages[key]) for key in sorted(own | set(_controls(stages, own))))


def _seconds(stages: Stages, keys: Iterable[str]) -> float:
    return math.fsum(_stage(stages[key]).seconds for key in keys)
