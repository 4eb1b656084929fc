"""Strategy ``variants``: several objectives at once, as students of one stage under one teacher."""

from __future__ import annotations

import kdcore

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    pass
