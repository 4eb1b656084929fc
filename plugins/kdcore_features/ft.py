"""Factor transfer: a student follows what a paraphraser says of its teacher.

Kim, Park and Kwak, NeurIPS 2018, arXiv:1802.04977, section 3.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

from .maps import map_pairs, match
from .options import FTOptions
from .pairs import Pair, features, taps


def ft_loss(student: Tensor, teacher: Tensor, *, power: int = 2, norm: int = 1) -> Tensor:
    """The public form: factors [B, M, H, W] become maps, mean_m f^power at unit length; mean |difference|^norm.

    An odd ``norm`` above 1 keeps the sign of a difference, as the public code does.
    """
    own, other = (F.normalize(f.pow(power).mean(1).flatten(1)) for f in match(student, teacher))
    return (own - other).abs().mean() if norm == 1 else (own - other).pow(norm).mean()


def ft_paper_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The paper's form with p = 1: factors [B, M, H, W] at unit length, channels kept; mean |difference|.

    The mean over elements, where the paper has a norm, is that of the authors' code, whose weight is 500.
    """
    own, other = (F.normalize(f.flatten(1)) for f in match(student, teacher))
    return (own - other).abs().mean()


def layers(*widths: int) -> nn.Sequential:
    """3x3 convolutions from width to width, each with batch norm and a leaky ReLU."""
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        parts += [convolution, nn.BatchNorm2d(after), nn.LeakyReLU(0.1)]
    return nn.Sequential(*parts)


class FT(nn.Module):
    """The registered loss ``ft``, of the deepest pair of taps.

    The paraphraser, an autoencoder of the teacher's feature, learns from its own reconstruction alone: its factor is a
    constant to the student. It is trained beside the student, where public code trains it for 30 epochs before.

    Args:
        pair: taps that correspond.
        student: channels of the student's feature.
        teacher: channels of the teacher's feature.
        options: those of the recipe.
    """

    needs: frozenset[str] = frozenset({"taps"})
    taps = staticmethod(taps)
    fixed = frozenset({"rate"})
    min_batch = 2  # of one position of one sample batch norm has no statistics

    def __init__(self, pair: Pair, student: int, teacher: int, options: FTOptions) -> None:
        super().__init__()
        factors = max(1, int(teacher * options.rate))
        self.pair, self.reconstruction = pair, options.reconstruction
        self.compare = ft_loss if options.variant == "public" else ft_paper_loss
        self.paraphrase, self.restore = (
            layers(teacher, teacher, factors, factors),
            layers(factors, factors, teacher, teacher),
        )
        self.translate = layers(student, student, factors, factors)

    @classmethod
    def build(cls, shapes: Shapes, options: FTOptions) -> Self:
        pair = map_pairs(shapes)[-1]
        return cls(pair, shapes.student[pair[0]][0], shapes.teacher[pair[1]][0], options)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Means over the batch, 0-d: ``factor``, and ``reconstruction``, which trains the paraphraser."""
        own, other = features(student, teacher, self.pair)
        factor = self.paraphrase(other)
        restored = F.mse_loss(self.restore(factor), other)
        transfer = self.compare(self.translate(own), factor.detach())
        return {"factor": transfer, "reconstruction": self.reconstruction * restored}
