"""What a recipe and its strategy name before the first stage: objectives and models, each with its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .plan import Json, ModelRef, Term
from .recipe import Recipe, place_of
from .runview import RunView


@dataclass(frozen=True)
class Objective:
    """Terms, and where each stands in the recipe."""

    terms: tuple[Term, ...]
    places: tuple[str, ...]

    @property
    def place(self) -> str:
        """Of the list that holds them."""
        return self.places[0].rpartition("[")[0] or self.places[0]


@dataclass
class Names:
    """What was named so far.

    Args:
        recipe: where places are looked up.
        view: of the recipe.
        objectives: the recipe's own, then those that the strategy made.
        models: (place, model) of those that the strategy made.
    """

    recipe: Recipe
    view: RunView
    objectives: list[Objective] = field(default_factory=list)
    models: list[tuple[str, ModelRef]] = field(default_factory=list)

    def __post_init__(self) -> None:
        terms = self.view.objective
        self.objectives.append(Objective(terms, tuple(f"objective[{i}]" for i in range(len(terms)))))

    def noted(self) -> RunView:
        """The view for a strategy, whose objectives and models are noted here."""
        return dataclasses.replace(self.view, terms=self._terms, model=self._model)

    def _terms(self, tables: Sequence[Mapping[str, Json]]) -> tuple[Term, ...]:
        terms = self.view.terms(tables)
        self.objectives.append(Objective(terms, tuple(place_of(table, self.recipe.strategy) for table in tables)))
        return terms

    def _model(self, table: Mapping[str, Json]) -> ModelRef:
        model = self.view.model(table)
        self.models.append((place_of(table, self.recipe.strategy), model))
        return model
