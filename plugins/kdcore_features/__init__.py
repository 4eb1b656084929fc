"""Feature, relation and logit losses of the literature, each a function of tensors and a loss for recipes.

A loss lies in the file of its name: a function that any training loop may call, and a class for recipes. What departs
from a paper is said in docs/features.md.
"""

from __future__ import annotations

import kdcore

KDCORE_HOOKS = 1

LOSSES = (  # name, "file:Class", options class in options.py, about
    ("fitnet", "fitnet:FitNet", "FitNetOptions", "a regressed feature, mean squared error (Romero et al., 2015)"),
    ("at", "at:AT", "ATOptions", "attention maps of the stages"),
    ("ab", "ab:AB", "ABOptions", "which neurons are active, with a margin (Heo et al., 2019)"),
    ("ft", "ft:FT", "FTOptions", "factors of a paraphraser and a translator (Kim et al., 2018)"),
    ("vid", "vid:VID", "VIDOptions", "features under a Gaussian of learned variance (Ahn et al., 2019)"),
    ("fsp", "fsp:FSP", "FSPOptions", "Gram matrices of neighbouring stages (Yim et al., 2017)"),
    ("nst", "nst:NST", "TapOptions", "distributions of the stages' channels over the image"),
    ("kdsvd", "kdsvd:KDSVD", "KDSVDOptions", "singular vectors of neighbouring stages (Lee et al., 2018)"),
    ("ofd", "ofd:OFD", "OFDOptions", "features before the activation, through a margin (overhaul of features)"),
    ("reviewkd", "reviewkd:ReviewKD", "ReviewKDOptions", "knowledge review: fused features, compared at four sizes"),
    ("crd", "crd:CRD", "CRDOptions", "contrastive representation distillation, with memory banks"),
    ("sp", "sp:SP", "SPOptions", "similarities between the samples of a batch, at the last stage"),
    ("pkt", "pkt:PKT", "PKTOptions", "probabilities that samples are neighbours"),
    ("rkd", "rkd:RKD", "RKDOptions", "distances and angles between samples"),
    ("cc", "cc:CC", "CCOptions", "correlations between samples under a Gaussian kernel"),
    ("irg", "irg:IRG", "IRGOptions", "graphs of samples and distances, and their changes between stages"),
    ("dist", "dist:Dist", "DistOptions", "DIST: Pearson's correlation across classes and across the batch"),
    ("nkd", "nkd:NKD", "NKDOptions", "NKD: the target class by the teacher's share, the others among themselves"),
    ("normkd", "normkd:NormKD", "NormKDOptions", "NormKD: a temperature of each sample's own, for KD or DKD"),
    ("mlkd", "mlkd:MLKD", "MLKDOptions", "MLKD: instance, batch and class level at five temperatures"),
)
ADAPTERS = (  # name, about
    ("auto", "linear for vectors, conv1x1 for maps, attention between unlike features"),
    ("conv1x1", "a 1x1 convolution of a map, pooled to the smaller size"),
    ("linear", "a linear map of a vector, or of each token"),
    ("attention", "learned queries attend to a map, tokens or a vector, for any feature of the teacher"),
)


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    for name, target, options, about in LOSSES:
        registry.loss(name, f"{__name__}.{target}", options=f"{__name__}.options:{options}", about=about)
    for name, about in ADAPTERS:
        registry.adapter(name, f"{__name__}.adapters:{name}", options=f"{__name__}.options:Options", about=about)
