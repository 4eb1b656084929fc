"""Knobs: what a controller may change in a running stage, by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PlanError, RecipeError, suggest
from ..options import validate
from ..plan import Json
from .member import Learner, LiveTerm
from .schedules import as_schedule


class Knobs:
    """All knobs of a stage.

    ``<member>.<term>.weight``, ``.source`` and every option of its loss; ``<member>.lr``; ``data.<name>`` for what the
    source or a transform offers in its ``knobs``.
    """

    def __init__(self, learners: Mapping[str, Learner], data: Sequence[Any]) -> None:
        self.learners = learners
        self.data: list[dict[str, Json]] = [part.knobs for part in data if hasattr(part, "knobs")]
        self.values: dict[str, Json] = dict(self._initial())

    def _initial(self) -> Iterator[tuple[str, Json]]:
        for learner in self.learners.values():
            if learner.spec.optimizer is not None:
                yield f"{learner.name}.lr", as_schedule(learner.spec.optimizer.lr).value
            for term in learner.terms:
                path = f"{learner.name}.{term.label}"
                yield f"{path}.weight", as_schedule(term.spec.weight).value
                yield f"{path}.source", term.source
                yield from ((f"{path}.{key}", value) for key, value in term.spec.options.items())
        for knobs in self.data:
            yield from ((f"data.{name}", value) for name, value in knobs.items())

    def set(self, path: str, value: Json) -> None:
        """Changes a knob; it takes effect at the next step.

        Raises:
            PlanError: no such knob, or not a value for it.
        """
        if path not in self.values:
            raise PlanError("no such knob", where=path, fix=suggest(path, self.values))
        self._check(path, value)
        self.values[path] = value
        self._apply(path, value)

    def restore(self, values: Mapping[str, Json]) -> None:
        """Sets every knob to what a checkpoint holds."""
        for path, value in values.items():
            if self.values[path] != value:
                self.set(path, value)

    def _check(self, path: str, value: Json) -> None:
        if path.endswith((".weight", ".lr")) and not (isinstance(value, int | float) and value >= 0):
            raise PlanError(f"{value!r} is not a number from 0", where=path)
        if path.endswith(".source") and value not in self.learners:
            raise PlanError(f"no member {value!r}", where=path, fix=suggest(str(value), self.learners))
        member, _, rest = path.partition(".")
        label, _, key = rest.rpartition(".")
        if label and key not in ("weight", "source"):
            term = self._term(member, label)
            try:
                validate(term.options, {**term.spec.options, key: value}, path.removesuffix(f".{key}"))
            except RecipeError as error:
                raise PlanError(error.what, where=error.where, fix=error.fix) from None

    def _apply(self, path: str, value: Json) -> None:
        owner, _, name = path.partition(".")
        if owner == "data":
            for knobs in self.data:
                if name in knobs:
                    knobs[name] = value
            return
        label, _, key = name.rpartition(".")
        if not label or key == "weight":
            return  # learning rates and weights are read at every tick
        term = self._term(owner, label)
        if key == "source":
            term.source = value
        elif hasattr(term.module, key):
            setattr(term.module, key, value)
        else:
            raise PlanError("the loss does not let this change", where=path, fix=f"It keeps no attribute {key!r}.")

    def _term(self, member: str, label: str) -> LiveTerm:
        return next(term for term in self.learners[member].terms if term.label == label)
