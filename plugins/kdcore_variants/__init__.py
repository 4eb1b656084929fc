"""Strategy ``variants``: several objectives at once, as students of one stage under one teacher.

The students see the same batches and start from the same weights, and the teacher runs once for all of them, so what
differs is the objective. Weights and other options may be chosen from a grid on the monitor split.
"""

from __future__ import annotations

import kdcore

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    here = __name__
    registry.strategy(
        "variants",
        f"{here}.strategy:Variants",
        options=f"{here}.options:VariantsOptions",
        about="several objectives under one teacher, their options from a grid",
    )
