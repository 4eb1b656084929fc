"""What every reader of a stored result relies on. Its folder is sealed, but anybody can seal one, e.g. in a pack."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, ValidationError, model_validator

from .errors import StorageError
from .options import Field, Plain
from .plan import Json


class StoredMember(Plain):
    """A member's part of result.json; the rest is for reports."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    trained: bool
    params: int
    flops: int | None
    latency_ms: float | None
    monitor_accuracy: float | None
    test_accuracy: float | None
    monitor_accuracy_last: float | None
    test_accuracy_last: float | None
    best_monitor_accuracy: float | None
    test_accuracy_at_best: float | None
    monitor_correct: str
    monitor_images: int = Field(ge=0)
    curve: list[dict[str, float]]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        try:
            found = len(base64.b64decode(self.monitor_correct, validate=True))
        except ValueError as error:
            raise ValueError(f"monitor_correct: {error}") from None
        if found != -(-self.monitor_images // 8):
            raise ValueError(f"monitor_correct has {found} bytes for {self.monitor_images} images")
        return self


class Stored(Plain):
    """A stage's result.json."""

    model_config = ConfigDict(extra="allow")

    key: str
    name: str
    members: dict[str, StoredMember]
    seconds: float
    steps: int
    flops: dict[str, int]
    member_seconds: dict[str, float]
    events: list[dict[str, Json]]
    warnings: list[str]
    environment: dict[str, Json]


def check_stored(result: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The result, if it is one of the stage with this key.

    Raises:
        StorageError: it is not, though its seal is whole.
    """
    fix = "Remove it: the stage is trained again."
    try:
        found = Stored.model_validate(dict(result))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StorageError(f"no result of kdcore: {place}: {first['msg']}", where=f"result {key}", fix=fix) from None
    if found.key != key:
        raise StorageError(f"it holds the result of {found.key[:12]}", where=f"result {key}", fix=fix)
    return dict(result)
