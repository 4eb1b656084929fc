"""The losses as modules: the functions' twins, with the same keyword arguments.

Each setting is an attribute that may be set between calls; a Parameter given as temperature is registered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from .functional import DKDSettings, KDSettings, dkd_loss, kd_loss
from .reference import Result, Target


def _settings(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


class _Twin(nn.Module):
    _defaults: ClassVar[dict[str, Any]]

    def _adopt(self, settings: dict[str, Any]) -> None:
        for name in settings.keys() - self._defaults.keys():
            raise TypeError(f"{type(self).__name__} has no setting {name!r}. Known: {', '.join(self._defaults)}.")
        for name, value in {**self._defaults, **settings}.items():
            setattr(self, name, value)

    def _current(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._defaults}

    def extra_repr(self) -> str:
        current = self._current().items()
        return ", ".join(f"{name}={value!r}" for name, value in current if not _same(value, self._defaults[name]))


class KDLoss(_Twin):
    """Module twin of :func:`kdcore.losses.kd_loss`."""

    _defaults = _settings(kd_loss)

    def __init__(self, *, return_parts: bool = False, **settings: Unpack[KDSettings]) -> None:
        super().__init__()
        self._adopt({"return_parts": return_parts, **settings})

    def forward(self, student: Tensor, teacher: Tensor, target: Target = None) -> Result:
        loss: Result = kd_loss(student, teacher, target, **self._current())
        return loss


class DKDLoss(_Twin):
    """Module twin of :func:`kdcore.losses.dkd_loss`."""

    _defaults = _settings(dkd_loss)

    def __init__(self, *, return_parts: bool = False, **settings: Unpack[DKDSettings]) -> None:
        super().__init__()
        self._adopt({"return_parts": return_parts, **settings})

    def forward(self, student: Tensor, teacher: Tensor, target: Target) -> Result:
        loss: Result = dkd_loss(student, teacher, target, **self._current())
        return loss
