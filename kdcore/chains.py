"""Who learned from whom in a run: every distilled learner's chain from its first teacher, out of result.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Table: TypeAlias = Mapping[str, Any]

CONTROL = "control"
_SIZED = re.compile(r"(.+)-(\d+)")


@dataclass(frozen=True)
class Link:
    """A learner of a chain: a member of the stage with this key."""

    stage: str
    member: str
    model: str


@dataclass(frozen=True)
class Chain:
    """A distilled learner with all that it descends from.

    Args:
        links: the first teacher, its assistants, the learner.
        seed: of the learner's stage.
        controllers: short names, those of all its distilled stages.
    """

    links: tuple[Link, ...]
    seed: int
    controllers: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(link.model for link in self.links)

    @property
    def label(self) -> str:
        """Like 10-8-2 where all models are of one family with a size, else like cnn-3 > mlp-4 > mlp-2."""
        return label(self.models)

    @property
    def end(self) -> Link:
        """The learner."""
        return self.links[-1]

    @property
    def stages(self) -> tuple[str, ...]:
        """Their keys, the first teacher's first."""
        return tuple(dict.fromkeys(link.stage for link in self.links))

    @property
    def distilled(self) -> tuple[str, ...]:
        """Keys of the stages that distil: all but the first teacher's."""
        return tuple(link.stage for link in self.links[1:])


@dataclass(frozen=True)
class Group:
    """The same chain under several seeds, in their order."""

    label: str
    controllers: tuple[str, ...]
    chains: tuple[Chain, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return self.chains[0].models


def chains(stages: Iterable[Table]) -> list[Chain]:
    """Every distilled learner's chain, in the order of the stages; learners without a teacher have none.

    A learner is distilled if its stage holds a frozen member that comes from another stage; a control beside it is not.

    Args:
        stages: as in result.json.
    """
    by_key = {stage["key"]: stage for stage in stages}
    return [_chain(by_key, key, member) for key, stage in by_key.items() for member in learners(stage)]


def learners(stage: Table) -> list[str]:
    """The members of a stage that are distilled."""
    trained = [role for role, member in stage["members"].items() if member["trained"] and role != CONTROL]
    return trained if teachers(stage) else []


def teachers(stage: Table) -> list[str]:
    """The frozen members of a stage that come from another one."""
    return [role for role in stage["inputs"] if role in stage["members"] and not stage["members"][role]["trained"]]


def teacher_of(stage: Table, role: str) -> tuple[str, str] | None:
    """Key and member of the result that a distilled member learns from: of several the one called teacher, or the
    first.
    """
    if role not in learners(stage):
        return None
    frozen = teachers(stage)
    origin = stage["inputs"]["teacher" if "teacher" in frozen else frozen[0]]
    return origin["stage"], origin["member"]


def whole(result: Table) -> list[Chain]:
    """The chains that stand for themselves: of the learners that the strategy names, and of those that teach nobody."""
    named = [result["student"], *(ref for refs in result["replicates"].values() for ref in refs)]
    ends = {(ref["stage"], ref["member"]) for ref in named}
    found = chains(result["stages"])
    begun = {chain.links[:-1] for chain in found}
    return [chain for chain in found if chain.links not in begun or (chain.end.stage, chain.end.member) in ends]


def chosen(result: Table, found: Iterable[Chain]) -> Chain | None:
    """The chain of the delivered student."""
    end = (result["student"]["stage"], result["student"]["member"])
    return next((chain for chain in found if (chain.end.stage, chain.end.member) == end), None)


def directs(found: Sequence[Chain]) -> dict[tuple[str, str], tuple[str, str]]:
    """Stage and member of every learner with assistants -> those of the direct one: the same model distilled from the
    same first teacher without assistants, under the same controllers and seed.
    """
    heads = {chain: (chain.models[0], chain.models[-1], chain.controllers, chain.seed) for chain in found}
    direct = {heads[chain]: chain.end for chain in found if len(chain.links) == 2}
    return {
        (chain.end.stage, chain.end.member): (end.stage, end.member)
        for chain in found
        if len(chain.links) > 2 and (end := direct.get(heads[chain])) is not None
    }


def groups(found: Iterable[Chain]) -> list[Group]:
    """Chains of the same models and controllers, one a seed. Where a seed has several (two objectives, say), the second
    ones are a group of their own, and so on.
    """
    members: dict[tuple[tuple[str, ...], tuple[str, ...], int], list[Chain]] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for chain in found:
        head = (chain.models, chain.controllers)
        nth = seen[*head, chain.seed] = seen.get((*head, chain.seed), -1) + 1
        members.setdefault((*head, nth), []).append(chain)
    return [
        Group(label(models) + f" ({nth + 1})" * (nth > 0), controllers, tuple(sorted(same, key=lambda c: c.seed)))
        for (models, controllers, nth), same in members.items()
    ]


def label(models: Sequence[str]) -> str:
    """Models as a chain is called: by their sizes if they are of one family."""
    sized = [_SIZED.fullmatch(model) for model in models]
    if all(sized) and len({match[1] for match in sized if match}) == 1:
        return "-".join(match[2] for match in sized if match)
    return " > ".join(models)


def stop(stage: Table) -> Table | None:
    """The first decision that ended the distillation, if one did."""
    return next((event for event in stage["events"] if ends_distillation(stage, event)), None)


def ends_distillation(stage: Table, event: Table) -> bool:
    """A term was set to weight 0, a teacher was dropped, or the stage was finished."""
    kind, target, value = event["kind"], str(event["target"]), event["value"]
    if kind == "drop":  # of a teacher; a dropped control or partner ends something else
        return not stage["members"].get(target, {"trained": True})["trained"]
    zero = isinstance(value, int | float) and math.isfinite(value) and value == 0
    return kind == "finish" or (kind == "set" and target.endswith(".weight") and zero)


def _chain(stages: Mapping[str, Table], key: str, member: str) -> Chain:
    links = [_link(stages, key, member)]
    controllers: list[str] = []
    while origin := teacher_of(stages[links[0].stage], links[0].member):
        controllers = [*stages[links[0].stage]["controllers"], *controllers]
        links.insert(0, _link(stages, *origin))
    return Chain(tuple(links), stages[key]["seed"], tuple(dict.fromkeys(controllers)))


def _link(stages: Mapping[str, Table], key: str, member: str) -> Link:
    return Link(key, member, stages[key]["members"][member]["model"])
