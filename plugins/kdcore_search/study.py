"""Trains chains as far as the budget goes, and knows what is trained."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import kdcore

from .budget import Ledger
from .chains import DIRECT, STUDENT, Chain, Chains, with_inputs

DIGITS = 12
"""Decimals of a mean that count: equal numbers of right images are equal, in whatever order seeds are summed."""


@dataclass
class Study:
    """Chains under every seed, with the run's controllers and, for a baseline, without.

    Args:
        chains: what they are made of.
        options: of the search.
        results: of all stages so far, by identity.
        trained: chains whose students are trained, in the order in which they were asked for.
        unpaid: chains that did not fit the budget.
        pruned: chains below an assistant that is too weak.
    """

    chains: Chains
    options: Any
    results: dict[str, kdcore.Result] = field(default_factory=dict)
    trained: list[Chain] = field(default_factory=list)
    unpaid: list[Chain] = field(default_factory=list)
    pruned: list[Chain] = field(default_factory=list)

    # ------------------------------------------------------------ what is known

    @property
    def seeds(self) -> range:
        first = self.chains.run.seed
        return range(first, first + self.options.seeds)

    def students(self, chain: Chain, controlled: bool = True) -> list[kdcore.MemberResult]:
        """The chain's student under each seed."""
        return self._learners((*chain, STUDENT), controlled)

    def accuracy(self, chain: Chain, controlled: bool = True) -> float:
        """Of the chain's student on the monitor split, the mean over seeds."""
        return _mean(self.students(chain, controlled))

    def worth(self, chain: Chain) -> float:
        """The accuracy; one that is not a number is less than all others."""
        accuracy = self.accuracy(chain)
        return -math.inf if math.isnan(accuracy) else accuracy

    def _learners(self, path: Chain, controlled: bool = True) -> list[kdcore.MemberResult]:
        stages = [self.chains.stage(path, seed, controlled) for seed in self.seeds]
        return [self.results[stage.identity]["student"] for stage in stages]

    # ------------------------------------------------------------ training

    def train(self, chains: Iterable[Chain]) -> Generator[list[kdcore.Stage], list[kdcore.Result], list[Chain]]:
        """Trains those of the chains that fit the budget and are not pruned, and returns them."""
        going = self._fitting(self._promising(chains))
        if (
            self.options.prune is not None
        ):  # assistants first, level by level, so that no student is wasted on a weak one
            for depth in range(1, 1 + max(map(len, going), default=0)):
                yield from self._ask([self.chains.stage(c[:depth], seed) for c in going for seed in self.seeds])
                going = self._promising(going)
        yield from self._ask([stage for chain in going for stage in self._stages(chain)])
        self.trained += going
        return going

    def _ask(self, stages: list[kdcore.Stage]) -> Generator[list[kdcore.Stage], list[kdcore.Result], None]:
        new = self._new(stages)
        if new:
            results = yield list(new.values())
            self.results |= dict(zip(new, results, strict=True))

    def _stages(self, chain: Chain) -> list[kdcore.Stage]:
        """The students' stages; what they need comes with them."""
        variants = (True, False) if self.options.baseline else (True,)
        return [self.chains.stage((*chain, STUDENT), seed, variant) for seed in self.seeds for variant in variants]

    def _new(self, stages: list[kdcore.Stage]) -> dict[str, kdcore.Stage]:
        return {key: stage for key, stage in with_inputs(stages).items() if key not in self.results}

    def _fitting(self, chains: Iterable[Chain]) -> list[Chain]:
        """Those that the budget pays, in their order; of the others the next may still fit."""
        ledger = Ledger.after(self.results.values(), self.options.budget, self.chains.run.estimate)
        planned: set[str] = set()
        found = []
        for chain in chains:
            new = {key: stage for key, stage in self._new(self._stages(chain)).items() if key not in planned}
            if limit := ledger.take(new.values()):
                self._refuse(chain, limit, len(new))
            else:
                planned |= new.keys()
                found.append(chain)
        return found

    def _refuse(self, chain: Chain, limit: str, stages: int) -> None:
        if chain == DIRECT:
            what = f"does not pay the direct student, which takes {stages} stages"
            raise kdcore.RecipeError(what, where=f"strategy.budget.{limit}", fix="Write more, or leave it out.")
        self.unpaid.append(chain)

    def _promising(self, chains: Iterable[Chain]) -> list[Chain]:
        """Those without an assistant that is known to be too weak."""
        chains = list(chains)
        weak = [chain for chain in chains if any(self._weak(chain[: i + 1]) for i in range(len(chain)))]
        self.pruned += weak
        return [chain for chain in chains if chain not in weak]

    def _weak(self, path: Chain) -> bool:
        """The last assistant of ``path`` is trained, and is too far below the best student so far."""
        if self.options.prune is None or self.chains.stage(path, self.seeds[0]).identity not in self.results:
            return False
        best = max(self.trained, key=self.worth)
        found = kdcore.paired_difference(self._learners(path), self.students(best))
        return found.error is not None and found.mean < -self.options.prune * found.error


def _mean(members: list[kdcore.MemberResult]) -> float:
    return round(math.fsum(member.accuracy for member in members) / len(members), DIGITS)
