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
    ("at", "at:AT", "ATOptions", "attention maps of the stages"),
    ("sp", "sp:SP", "TapOptions", "similarities between the samples of a batch"),
    ("pkt", "pkt:PKT", "PKTOptions", "probabilities that samples are neighbours"),
    ("rkd", "rkd:RKD", "RKDOptions", "distances and angles between samples"),
    ("nst", "nst:NST", "TapOptions", "distributions of the stages' channels over the image"),
    ("cc", "cc:CC", "CCOptions", "correlations between samples under a Gaussian kernel"),
    ("irg", "irg:IRG", "IRGOptions", "graphs of samples and distances, and their changes between stages"),
    ("dist", "dist:Dist", "DistOptions", "DIST: Pearson's correlation across classes and across the batch"),
    ("nkd", "nkd:NKD", "NKDOptions", "NKD: the target class by the teacher's share, the others among themselves"),
    ("normkd", "normkd:NormKD", "NormKDOptions", "NormKD: a temperature of each sample's own, for KD or DKD"),
    ("mlkd", "mlkd:MLKD", "MLKDOptions", "MLKD: instance, batch and class level at five temperatures"),
)


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    for name, target, options, about in LOSSES:
        registry.loss(name, f"{__name__}.{target}", options=f"{__name__}.options:{options}", about=about)
