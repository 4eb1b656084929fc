"""Content keys of stages: equal keys mean equal results, so nothing is trained twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .codec import digest, encode
from .files import storing
from .folders import FORMAT
from .job import Job, Settings
from .plan import BASE_METRICS, Json, Schedule, SourceSpec, Stage
from .reading import open_plain
from .registry import Catalog
from .transforms import every


@dataclass
class Keys:
    """Keys under one catalog, seed and numerics.

    key = sha256 of the canonical JSON of {stage, keys of its inputs, data fingerprint, code, numerics, format}. A data
    set counts by its fingerprint and a weights file by its content, so neither path nor download date matters.

    Args:
        catalog: where a stage's names are found; each plugin that it names adds its version and source to the key.
        seed: of stages that state none.
        settings: device type, threads and precision change bits.
        fingerprint: of the data that a :class:`SourceSpec` gives.
    """

    catalog: Catalog
    seed: int
    settings: Settings
    fingerprint: Callable[[SourceSpec], str]
    _keys: dict[Stage, str] = field(default_factory=dict)
    _codes: dict[Stage, Json] = field(default_factory=dict)

    def of(self, stage: Stage) -> str:
        """The key of a stage."""
        if stage not in self._keys:
            self._keys[stage] = digest(
                {
                    "stage": self._content(stage),
                    "data": self.fingerprint(stage.data),
                    "code": self._code(stage),
                    "numerics": self.settings.numerics,
                    "format": FORMAT,
                }
            )
        return self._keys[stage]

    def job(self, stage: Stage) -> Job:
        """The stage as an executor gets it."""
        needs = tuple(dict.fromkeys(self.of(ref.stage) for ref in stage.inputs() if isinstance(ref.stage, Stage)))
        data = self.fingerprint(stage.data)
        return Job(self.of(stage), stage.name, self._encoded(stage), needs, self._code(stage), self.settings, data)

    def _encoded(self, stage: Stage) -> dict[str, Any]:
        return {"seed": self.seed, **encode(stage, self.of)}

    def _content(self, stage: Stage) -> Json:
        data = self._encoded(stage)
        data["data"] = {**data["data"], "dataset": None, "own": source_fingerprint(stage, self.catalog)}
        for member in data["members"].values():
            if "weights" in member["model"]:
                member["model"]["weights"] = file_digest(member["model"]["weights"])
        return data

    def _code(self, stage: Stage) -> Json:
        if stage not in self._codes:
            self._codes[stage] = code_of(stage, self.catalog)
        return self._codes[stage]


def code_of(stage: Stage, catalog: Catalog) -> Json:
    """Version and source digest, as they are on disk now, of every plugin that a stage names."""
    origins = {catalog.find(kind, name).origin for kind, name in names(stage, catalog)}
    return sorted((origin.code() for origin in origins), key=lambda code: code["plugin"])


def names(stage: Stage, catalog: Catalog) -> Iterator[tuple[str, str]]:
    """(kind, name) of everything whose code can change what a stage trains."""
    yield "step", stage.step.name
    yield "dataset", stage.data.dataset.name  # which may read pixels while a stage trains
    yield "source", stage.data.source.name
    yield from (("transform", spec.name) for spec in every(stage.data.transforms, catalog))
    for spec in stage.controllers:
        yield "controller", spec.name
        needs = catalog.find("controller", spec.name).load().needs
        yield from (("metric", name) for name in needs - BASE_METRICS)
    for member in stage.members.values():
        yield "model", member.model.model
        if member.model.label_map is not None:
            yield "label_map", member.model.label_map.name
        for term in member.terms:
            yield "loss", term.loss
            if adapter := catalog.adapter_of(catalog.find("loss", term.loss).options_class()(**term.options)):
                yield "adapter", adapter.full_name
            if isinstance(term.weight, Schedule):
                yield "schedule", term.weight.shape.name
        if member.optimizer is not None:
            yield "optimizer", member.optimizer.name
            if isinstance(member.optimizer.lr, Schedule):
                yield "schedule", member.optimizer.lr.shape.name


def source_fingerprint(stage: Stage, catalog: Catalog) -> Json:
    """What a source says of data of its own, e.g. files that it reads; most have none."""
    spec = stage.data.source
    entry = catalog.find("source", spec.name)
    fingerprint = getattr(entry.load(), "fingerprint", None)
    return None if fingerprint is None else fingerprint(entry.options_class()(**spec.options))


def file_digest(path: str) -> str:
    """sha256 of a file's content; read again only if the file was touched."""
    with storing(Path(path)):
        about = Path(path).stat()
        return _file_digest(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=64)
def _file_digest(path: str, changed: int, size: int) -> str:
    with open_plain(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_order(stages: list[Stage], keys: Keys) -> list[Stage]:
    """The stages and everything that they need, inputs first, each key once."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        for ref in stage.inputs():
            if isinstance(ref.stage, Stage):
                visit(ref.stage)
        ordered.setdefault(keys.of(stage), stage)

    for stage in stages:
        visit(stage)
    return list(ordered.values())
