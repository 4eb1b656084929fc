"""Feature, relation and logit losses of the literature, each a function of tensors and a loss for recipes.

A loss lies in the file of its name: a function that any training loop may call, and a class for recipes. What departs
from a paper is said in docs/features.md.
"""

from __future__ import annotations

import kdcore

KDCORE_HOOKS = 1

LOSSES = (  # name, "file:Class", options class in options.py, about
    ("dist", "dist:Dist", "DistOptions", "DIST: Pearson's correlation across classes and across the batch"),
    ("nkd", "nkd:NKD", "NKDOptions", "NKD: the target class by the teacher's share, the others among themselves"),
    ("normkd", "normkd:NormKD", "NormKDOptions", "NormKD: a temperature of each sample's own, for KD or DKD"),
    ("mlkd", "mlkd:MLKD", "MLKDOptions", "MLKD: instance, batch and class level at five temperatures"),
)


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    for name, target, options, about in LOSSES:
        registry.loss(name, f"{__name__}.{target}", options=f"{__name__}.options:{options}", about=about)
