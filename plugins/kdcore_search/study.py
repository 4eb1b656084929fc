"""Trains chains as far as the budget goes, and knows what is trained."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field

import kdcore

from .budget import Ledger
from .chains import DIRECT, STUDENT, Chain, Chains, with_inputs
from .options import SearchOptions

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
        unpaid: chains that did not fit the budget, with the limits that they would have broken.
        pruned: chains that begin with an assistant that is too weak, with how it stands to the best student.
    """

    chains: Chains
    options: SearchOptions
    results: dict[str, kdcore.Result] = field(default_factory=dict)
    trained: list[Chain] = field(default_factory=list)
    unpaid: dict[Chain, Mapping[str, float]] = field(default_factory=dict)
    pruned: dict[Chain, tuple[Chain, kdcore.Difference]] = field(default_factory=dict)

    # ------------------------------------------------------------ what is known

    @property
    def seeds(self) -> range:
        first = self.chains.run.seed
        return range(first, first + self.options.seeds)

    def students(self, chain: Chain, controlled: bool = True) -> list[kdcore.MemberResult]:
        """The chain's student under each seed."""
        return self._learners((*chain, STUDENT), controlled)

    def accuracy(self, chain: Chain) -> float:
        """Of the chain's student on the monitor split, the mean over seeds."""
        members = self.students(chain)
        return round(math.fsum(member.accuracy for member in members) / len(members), DIGITS)

    def worth(self, chain: Chain) -> float:
        """The accuracy; one that is not a number is less than all others."""
        accuracy = self.accuracy(chain)
        return -math.inf if math.isnan(accuracy) else accuracy

    def _learners(self, path: Chain, controlled: bool = True) -> list[kdcore.MemberResult]:
        stages = [self.chains.stage(path, seed, controlled) for seed in self.seeds]
        return [self.results[stage.identity]["student"] for stage in stages]

    def spent(self) -> list[tuple[str, float, float]]:
        """Name, total and limit of everything that the budget limits."""
        return Ledger.after(self.results.values(), self.options.budget, self.chains.run.estimate).totals()

    # ------------------------------------------------------------ training

    def train(self, chains: Iterable[Chain]) -> Generator[list[kdcore.Stage], list[kdcore.Result], list[Chain]]:
        """Trains those of the chains that are not pruned and fit the budget, and returns them."""
        going = self._fitting(self._promising(chains))
        if self.options.prune is not None:  # assistants first, so that no student is spent on a weak one
            for depth in range(1, 1 + max(map(len, going), default=0)):
                yield from self._ask([self.chains.stage(c[:depth], seed) for c in going for seed in self.seeds])
                going = self._promising(going)
        yield from self._ask([stage for chain in going for stage in self._stages(chain)])
        self.trained += going
        return going

    def _ask(self, stages: Iterable[kdcore.Stage]) -> Generator[list[kdcore.Stage], list[kdcore.Result], None]:
        new = with_inputs(stages, self.results)
        if new:
            results = yield list(new.values())
            self.results |= dict(zip(new, results, strict=True))

    def _stages(self, chain: Chain) -> list[kdcore.Stage]:
        """The students' stages; what they need comes with them."""
        variants = (True, False) if self.options.baseline else (True,)
        return [self.chains.stage((*chain, STUDENT), seed, variant) for seed in self.seeds for variant in variants]

    def _fitting(self, chains: Iterable[Chain]) -> list[Chain]:
        """Those that the budget pays, in their order; where one does not fit, a later one still may."""
        ledger = Ledger.after(self.results.values(), self.options.budget, self.chains.run.estimate)
        known, found = set(self.results), []
        for chain in chains:
            new = with_inputs(self._stages(chain), known)
            if broken := ledger.take(new.values()):
                self._refuse(chain, broken)
            else:
                known |= new.keys()
                found.append(chain)
        return found

    def _refuse(self, chain: Chain, broken: Mapping[str, float]) -> None:
        if chain == DIRECT:
            name, needed = next(iter(broken.items()))
            what = f"{getattr(self.options.budget, name)} is less than the direct student takes, {needed:.6g}"
            raise kdcore.RecipeError(what, where=f"strategy.budget.{name}", fix="Write more, or leave it out.")
        self.unpaid[chain] = broken

    def _promising(self, chains: Iterable[Chain]) -> list[Chain]:
        """Those without an assistant that is known to be too weak: too far below the best student so far."""
        if self.options.prune is None or not self.trained:
            return list(chains)
        best, found = self.students(max(self.trained, key=self.worth)), list[Chain]()
        for chain in chains:
            paths = [path for path in self.prefixes(chain) if self._is_weak(path, best, self.options.prune)]
            if paths:
                self.pruned[chain] = paths[0], kdcore.paired_difference(self._learners(paths[0]), best)
            else:
                found.append(chain)
        return found

    def prefixes(self, chain: Chain) -> list[Chain]:
        """The paths from the teacher to each assistant of the chain that is trained."""
        paths = (chain[: i + 1] for i in range(len(chain)))
        return [path for path in paths if self.chains.stage(path, self.seeds[0]).identity in self.results]

    def _is_weak(self, path: Chain, best: list[kdcore.MemberResult], limit: float) -> bool:
        """The last assistant of ``path`` is more than so many standard errors below the best."""
        found = kdcore.paired_difference(self._learners(path), best)
        return found.error is not None and found.mean < -limit * found.error
