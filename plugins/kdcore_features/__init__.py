"""Feature, relation and logit losses of the literature, each a function of tensors and a loss for recipes.

A loss lies in the file of its name: a function that any training loop may call, and a class for recipes. What departs
from a paper is said in docs/features.md.
"""

from __future__ import annotations

import kdcore

KDCORE_HOOKS = 1

LOSSES = (  # name, "file:Class", options class in options.py, about
    ("crd", "crd:CRD", "CRDOptions", "contrastive representation distillation, with memory banks"),
    ("ofd", "ofd:OFD", "OFDOptions", "features before the activation, through a margin (overhaul of features)"),
    ("reviewkd", "reviewkd:ReviewKD", "ReviewKDOptions", "knowledge review: fused features, compared at four sizes"),
)


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    for name, target, options, about in LOSSES:
        registry.loss(name, f"{__name__}.{target}", options=f"{__name__}.options:{options}", about=about)
