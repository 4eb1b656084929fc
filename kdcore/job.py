"""A stage as it is handed to an executor: plain JSON, so that it can cross to another process or machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from .plan import Json, Spec

Event: TypeAlias = Mapping[str, Any]
Emit: TypeAlias = Callable[[Event], None]
STOP = Spec("core/stop")


@dataclass(frozen=True)
class Settings:
    """How stages of a run are executed. ``device``, ``threads``, ``precision``, ``channels_last``, ``compile`` and
    ``world_size`` change bits, so they are part of a stage's key; the rest is not.
    """

    store: str
    device: str = "cpu"
    threads: int = 1
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    world_size: int = 1
    log_every: int = 50
    checkpoint_seconds: float = 20.0
    workers: int = 0
    strict: bool = False
    failure: Spec = STOP
    plugin_files: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    @property
    def numerics(self) -> dict[str, Json]:
        from . import NUMERICS

        device = self.device.partition(":")[0]
        compiled = {"compile": True} if self.compile else {}
        return {
            "kdcore": NUMERICS, "device": device, "threads": self.threads, "precision": self.precision,
            "channels_last": self.channels_last, "world_size": self.world_size, **compiled,
        }  # fmt: skip


@dataclass(frozen=True)
class Job:
    """An encoded stage under its key.

    Args:
        key: content key of the stage.
        name: for people.
        stage: what :func:`kdcore.plan.encode` gave.
        needs: keys whose results must be in the store before it starts.
        code: of the plugins that it names, as the key holds it; a process that finds another refuses the job.
        settings: how to execute it.
        data: fingerprint of its data, as the key holds it; a process that finds others refuses the job.
    """

    key: str
    name: str
    stage: Json
    needs: tuple[str, ...]
    code: Json
    settings: Settings
    data: str = ""

    def to_text(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Job:
        """The job that :meth:`to_text` wrote."""
        data = json.loads(text)
        settings = data["settings"]
        for name in ("plugin_files", "blocked"):
            settings[name] = tuple(settings[name])
        settings["failure"] = Spec(**settings["failure"])
        return cls(**{**data, "needs": tuple(data["needs"]), "settings": Settings(**settings)})
