"""Strategy ``search``: which assistants to put between teacher and student.

Si et al., Multi-assistant Dynamic Setting Method for Knowledge Distillation, Computer Science 52(5), 2025, algorithm 1
(``greedy``), and beyond it: every subset of the candidates (``exhaustive``), several chains at a time (``beam``),
models of any families, decisions over seeds with standard errors, budgets and pruning. docs/search.md has the rules.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar, Literal

import kdcore

from . import decide
from .budget import Budget
from .chains import DIRECT, Chain, Chains
from .study import Study

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.strategy("search", Search, about="finds a chain of assistants: greedy, exhaustive or beam")


class Search:
    """Grows chains from the direct student on: each round puts one assistant more next to the teacher."""

    class Options(kdcore.Options):
        """Candidates, the rule by which chains are kept, and what the search may cost."""

        example: ClassVar[Mapping[str, Any]] = {"candidates": [{"model": "mlp", "size": 2}]}

        candidates: list[dict[str, Any]] = kdcore.Field(
            min_length=1, description='models between teacher and student, e.g. [{ model = "cnn", size = 2 }]'
        )
        mode: Literal["greedy", "exhaustive", "beam"] = kdcore.Field(
            "greedy", description='"greedy", "exhaustive" or "beam"'
        )
        width: int = kdcore.Field(2, ge=1, description="the chains that a beam keeps a round, from 1")
        assistants: int | None = kdcore.Field(
            None, ge=1, description="the most assistants of a chain, from 1; without it, as many as candidates"
        )
        order: Literal["parameters", "flops"] = kdcore.Field(
            "parameters", description='what a size is: "parameters" or "flops"'
        )
        allow_equal: bool = kdcore.Field(False, description="true if neighbours in a chain may be of one size")
        seeds: int = kdcore.Field(1, ge=1, description="the number of seeds that every chain is trained under, from 1")
        baseline: bool = kdcore.Field(False, description="true to train every chain without controllers, too")
        prune: float | None = kdcore.Field(
            None, ge=0, description="standard errors by which an assistant may be below the best student, e.g. 3.0"
        )
        budget: Budget = kdcore.Field(Budget(), description="a table, e.g. { stages = 20, tflops = 50.0 }")

    def plan(self, run: kdcore.RunView, options: Options) -> kdcore.Plan:
        if options.baseline and not run.controllers:
            what = "there is no controller to leave out"
            raise kdcore.RecipeError(what, where="strategy.baseline", fix="Add a [[controller]], or write false.")
        study = Study(Chains.of(run, options), options)
        yield from study.train([DIRECT])
        yield decide.started(study)
        front, best = [DIRECT], DIRECT
        choose = exhaustive if options.mode == "exhaustive" else beam
        for _ in range(options.assistants or len(options.candidates)):
            chains = [longer for chain in front for longer in study.chains.longer(chain)]
            trained = yield from study.train(chains)
            front, best = yield from choose(study, chains, trained, best)
            yield from decide.left_out(study, chains, best)
        if (other := decide.next_best(study, best)) is not None:
            yield decide.between(study, best, other, "is delivered, the next best is", best)
        return decide.outcome(study, best)


Choosing = Generator[kdcore.Choice, None, tuple[list[Chain], Chain]]


def beam(study: Study, chains: list[Chain], trained: list[Chain], best: Chain) -> Choosing:
    """Keeps the best chains that are not worse than without their new assistant; greedy is a beam of width 1."""
    width = study.options.width if study.options.mode == "beam" else 1

    def rank(chain: Chain) -> tuple[float, int, int]:
        return -study.worth(chain), -len(chain), study.chains.size(chain)  # a tie keeps the assistant, then the smaller

    ranked = sorted(trained, key=rank)
    kept = [c for c in ranked if study.worth(c) > float("-inf") and study.worth(c) >= study.worth(c[1:])][:width]
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
