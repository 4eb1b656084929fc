"""What models and stages cost, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .plan import ModelRef, SourceSpec, Spec, Stage
from .registry import Catalog
from .runview import ModelCost


@dataclass
class Measure:
    """Measures models on images like the data's; each model once.

    Args:
        catalog: where models are found.
        load: the splits of a source.
        data: the run's.
    """

    catalog: Catalog
    load: Callable[[SourceSpec], Any]
    data: SourceSpec
    _known: dict[str, ModelCost] = field(default_factory=dict)

    def model(self, ref: ModelRef) -> ModelCost:
        """Parameters, and FLOPs of one image forward; 0 of a model that does not take images."""
        known = repr(ref)
        if known not in self._known:
            self._known[known] = self._measured(ref)
        return self._known[known]

    def _measured(self, ref: ModelRef) -> ModelCost:
        from .training import cost
        from .training.member import build_model, classifies

        info = self.load(self.data).info
        module = build_model(ref, self.catalog, info, 0).eval()
        return ModelCost(cost.parameters(module), cost.flops(module, info) if classifies(module) else 0)

    def stage(self, stage: Stage) -> int:
        """FLOPs of a stage in which nothing stops: a forward pass of every frozen member and three times that of every
        trained one (four times, where pieces go forward twice), over all images; where outputs are cached, one pass
        over the training split a view. A stream counts one batch a step.
        """
        splits, size = self.load(stage.data), stage.data.batch_size
        images = len(splits.train) // size * size if stage.data.drop_last else len(splits.train)
        if stage.tick != "epoch":
            images = size
        images *= math.prod(_copies(spec, self.catalog) for spec in stage.data.transforms)
        seen = images * stage.length
        frozen = seen if stage.data.cache is None else min(stage.data.cache.views, stage.length) * len(splits.train)
        trained = seen * (4 if self._goes_twice(stage) else 3)
        return sum(self.model(m.model).flops * (trained if m.terms else frozen) for m in stage.members.values())

    def _goes_twice(self, stage: Stage) -> bool:
        """True if batches are in pieces, and a loss looks across them; one on features is refused there."""
        if stage.data.accumulate == 1:
            return False
        from .outputs import Shapes
        from .training.memory import across

        splits = self.load(stage.data)
        shapes = Shapes(splits.info.classes, len(splits.train), labels=splits.train.labels)
        terms = [term for member in stage.members.values() for term in member.terms if term.weight != 0]
        found = [(self.catalog.find("loss", term.loss), term) for term in terms]
        return any(
            across(entry.load().build(shapes, entry.options_class()(**term.options)))
            for entry, term in found
            if "taps" not in entry.load().needs
        )


def _copies(spec: Spec, catalog: Catalog) -> int:
    """How many samples a transform makes of one."""
    return int(getattr(catalog.find("transform", spec.name).options_class(), "copies", 1))
