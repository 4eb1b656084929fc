"""What to do when a stage runs out of memory: the words of a failure policy, and the two that every recipe has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .options import Options


@dataclass(frozen=True)
class Failure:
    """A stage that ran out of memory.

    Args:
        stage: its name.
        step: the step at which it happened.
        batch_size: samples of a batch.
        pieces: into how many pieces each batch was cut; 1 for whole batches.
        most: the largest number of pieces: single samples, or pairs where a trained member normalises by the batch.
        error: what the allocator said.
    """

    stage: str
    step: int
    batch_size: int
    pieces: int
    most: int
    error: str


@dataclass(frozen=True)
class Retry:
    """Another try from the newest checkpoint, every batch in so many pieces: above the failure's ``pieces``, at most
    its ``most``.
    """

    pieces: int


class FailurePolicy(Protocol):
    """What ``execute.failure`` names. Constructed with its validated options, in the process that trains the stage."""

    def decide(self, failure: Failure) -> Retry | None:
        """Another try, or None: then the stage, and with it the run, ends with a DeviceError."""
        ...


class StopPolicy:
    """``stop``: the run ends."""

    Options = Options

    def __init__(self, options: Any) -> None:
        pass

    def decide(self, failure: Failure) -> Retry | None:
        return None


class RetryPolicy:
    """``retry``: twice as many pieces, as often as it takes."""

    Options = Options

    def __init__(self, options: Any) -> None:
        pass

    def decide(self, failure: Failure) -> Retry | None:
        return Retry(min(2 * failure.pieces, failure.most)) if failure.pieces < failure.most else None
