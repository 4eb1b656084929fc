"""Strategy ``search``: which assistants to put between teacher and student.

Si et al., Multi-assistant Dynamic Setting Method for Knowledge Distillation, Computer Science 52(5), 2025, algorithm 1
(``greedy``), and beyond it: every subset of the candidates (``exhaustive``), several chains at a time (``beam``),
models of any families, decisions over seeds with standard errors, budgets and pruning. docs/search.md has the rules.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import kdcore

from . import decide
from .chains import DIRECT, Chain, Chains
from .options import SearchOptions
from .study import Study

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.strategy("search", Search, about="finds a chain of assistants: greedy, exhaustive or beam")


class Search:
    """Grows chains from the direct student on: a round puts one assistant more between the teacher and the others."""

    Options = SearchOptions

    def plan(self, run: kdcore.RunView, options: SearchOptions) -> kdcore.Plan:
        if options.baseline and not run.controllers:
            fix = "Add a [[controller]], or leave it out."
            raise kdcore.RecipeError("there is no controller to leave out", where="strategy.baseline", fix=fix)
        study = Study(Chains.of(run, options), options)
        yield from study.train([DIRECT])
        yield decide.started(study)
        front, best = [DIRECT], DIRECT
        choose = exhaustive if options.mode == "exhaustive" else beam
        for _ in range(options.longest):
            chains = [longer for chain in front for longer in study.chains.longer(chain)]
            if not chains:
                break
            trained = yield from study.train(chains)
            front, best = yield from choose(study, chains, trained, best)
            yield from decide.left_out(study, chains, best)
        if (other := decide.next_best(study, best)) is not None:
            yield decide.between(study, best, other, "is delivered, the next best is", best)
        return decide.outcome(study, best)


Choosing = Generator[kdcore.Choice, None, tuple[list[Chain], Chain]]


def beam(study: Study, chains: list[Chain], trained: list[Chain], best: Chain) -> Choosing:
    """Keeps the best chains that are not worse than without their new assistant; greedy is a beam of width 1."""

    def rank(chain: Chain) -> tuple[float, int, int]:
        return -study.worth(chain), -len(chain), study.chains.size(chain)  # a tie keeps the assistant, then the smaller

    def helps(chain: Chain) -> bool:
        return -math.inf < study.worth(chain) >= study.worth(chain[1:])

    ranked = sorted(trained, key=rank)
    kept = list(filter(helps, ranked))[: study.options.kept]
    best = min([best, *kept], key=rank)
    for chain in kept:
        yield decide.between(study, chain, chain[1:], "instead of", best)
    if ranked and not kept:
        yield decide.between(study, ranked[0][1:], ranked[0], "stays, not", best)
    return kept, best


def exhaustive(study: Study, chains: list[Chain], trained: list[Chain], best: Chain) -> Choosing:
    """Goes on with every chain; of equally good ones the smaller is the better."""

    def rank(chain: Chain) -> tuple[float, int]:
        return -study.worth(chain), study.chains.size(chain)

    if trained:
        challenger, before = min(trained, key=rank), best
        best = min([best, challenger], key=rank)
        loser, how = (before, "instead of") if best == challenger else (challenger, "stays, not")
        yield decide.between(study, best, loser, how, best)
    return chains, best
