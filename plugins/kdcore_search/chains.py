"""Chains of assistants, and the stages that train them."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import kdcore

from .candidates import labels, measured, named
from .options import SearchOptions

Chain: TypeAlias = tuple[int, ...]
"""The assistants from the teacher's side to the student's, as numbers of candidates from 1, the smallest."""

DIRECT: Chain = ()
STUDENT = 0


@dataclass(frozen=True)
class Chains:
    """What chains are made of. Equal parts of chains are one stage.

    Args:
        run: the recipe.
        models: the student, then the candidates from small to large.
        sizes: of the models.
        labels: of the teacher, then of the models.
        between: what stands between two labels.
        allow_equal: neighbours may be of one size, and an assistant may follow itself.
    """

    run: kdcore.RunView
    models: tuple[kdcore.ModelRef, ...]
    sizes: tuple[int, ...]
    labels: tuple[str, ...]
    between: str
    allow_equal: bool
    _stages: dict[tuple[Chain, int, bool], kdcore.Stage] = field(default_factory=dict)

    @classmethod
    def of(cls, run: kdcore.RunView, options: SearchOptions) -> Chains:
        """Names every candidate, then measures them.

        Raises:
            RecipeError: one is unknown, there twice, or not between student and teacher.
        """
        candidates = named(run, options.candidates)
        smallest, ordered = measured(run, candidates, options.order, options.allow_equal)
        models = (run.student, *(model for _, model in ordered))
        names, between = labels([run.teacher, *models])
        sizes = (smallest, *(size for size, _ in ordered))
        return cls(run, models, sizes, tuple(names), between, options.allow_equal)

    def longer(self, chain: Chain) -> Iterator[Chain]:
        """The chain with one assistant more between the teacher and its first, from small to large."""
        below = self.sizes[chain[0] if chain else STUDENT]
        for i, size in enumerate(self.sizes[1:], 1):
            if not chain or size > below or (self.allow_equal and size == below):
                yield (i, *chain)

    def size(self, chain: Chain) -> int:
        """Of all its assistants."""
        return sum(self.sizes[i] for i in chain)

    def name(self, chain: Chain) -> str:
        """E.g. ``10-8-2`` or ``cnn-3 > mlp-4 > mlp-2``, from the teacher to the student."""
        return self.path_name((*chain, STUDENT))

    def path_name(self, path: Chain) -> str:
        """The same without the student."""
        return self.between.join([self.labels[0], *(self.labels[i + 1] for i in path)])

    def stage(self, path: Chain, seed: int, controlled: bool = True) -> kdcore.Stage:
        """Trains the last model of ``path`` below the ones before it; of an empty path, the teacher."""
        key = (path, seed, controlled or not path)  # teachers have no controllers
        if key not in self._stages:
            self._stages[key] = self._made(*key)
        return self._stages[key]

    def _made(self, path: Chain, seed: int, controlled: bool) -> kdcore.Stage:
        view = dataclasses.replace(self.run, seed=seed, controllers=self.run.controllers if controlled else ())
        if not path:
            return view.label_only("teacher", view.teacher)
        above = self.stage(path[:-1], seed, controlled)
        stage = view.distilled(self.models[path[-1]], above["student" if path[:-1] else "teacher"])
        about = [f"seed {seed}"] if seed != self.run.seed else []
        about += [] if controlled else ["without controllers"]
        return dataclasses.replace(stage, name=" ".join([self.path_name(path), *(f"({text})" for text in about)]))


def with_inputs(stages: Iterable[kdcore.Stage], known: Container[str]) -> dict[str, kdcore.Stage]:
    """The stages and all that they need, inputs first, by identity; what is ``known`` is left out."""
    found: dict[str, kdcore.Stage] = {}

    def visit(stage: kdcore.Stage) -> None:
        if stage.identity not in found and stage.identity not in known:
            for ref in stage.inputs():
                if isinstance(ref.stage, kdcore.Stage):
                    visit(ref.stage)
            found[stage.identity] = stage

    for stage in stages:
        visit(stage)
    return found
