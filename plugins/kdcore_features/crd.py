"""Contrastive representation distillation (Tian et al., ICLR 2020, arXiv:1910.10699, section 3.2).

With unit vectors v of a student's and a teacher's embedding, memory banks M of one vector a training sample, the
sample itself in column 0 of an index and K samples of other classes after it:

    x_j = exp(v . M[index_j] / T) / Z
    loss = -mean over the batch of [log(x_0 / (x_0 + K/N)) + sum over j > 0 of log((K/N) / (x_j + K/N))]

added for student vectors against the teacher's bank and the reverse. N is the size of the training split; Z, which is N
times the mean of the exponentials, is taken from the first batch and then fixed.
"""

from __future__ import annotations

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import Batch, Outputs, PlanError, Shapes

from .options import CRDOptions
from .pairs import features, pairs

EPS = 1e-7
BITS = 31  # of a random integer that chooses a sample: its bias is at most N / 2^31


def scores(vectors: Tensor, bank: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Similarities over the temperature, [B, 1 + K]: the logarithm of x up to Z.

    All N products are computed: on a CPU core, 64 x 45,000 take a tenth of the time of a copy of 64 x 16,384 rows.

    Args:
        vectors: [B, D], of length 1.
        bank: [N, D].
        index: [B, 1 + K] int64, rows of the bank.
        temperature: T.
    """
    # A sample that was drawn twice adds equal gradients: their sum is the same in any order, as a GPU may take them.
    return (vectors @ bank.T).gather(1, index) / temperature


def log_normaliser(scores: Tensor, samples: int) -> Tensor:
    """The logarithm of Z, 0-d, from the scores [B, 1 + K] of a batch, without their graph."""
    return scores.detach().flatten().logsumexp(0) + math.log(samples / scores.numel())


def contrast(scores: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """One direction of the loss, 0-d.

    Everything stays in the logarithm: exp(1 / T) leaves float32 below T = 0.012.

    Args:
        scores: [B, 1 + K], with the sample itself in column 0.
        log_z: log Z, 0-d.
        samples: N.
    """
    noise = (scores.shape[1] - 1) / samples
    odds = scores - log_z - math.log(noise + EPS)
    wrong = F.logsigmoid(-odds[:, 1:]) - math.log1p(EPS / noise)
    return -(F.logsigmoid(odds[:, 0]) + wrong.sum(1)).mean()


def moved(bank: Tensor, index: Tensor, vectors: Tensor, momentum: float) -> Tensor:
    """A copy of the bank [N, D] with the rows at ``index`` [B] moved towards ``vectors`` [B, D].

    Of a sample that is twice in the batch, in two views, the last vector counts; a GPU would take any.

    The old one belongs to the graph of this step, which still has its backward pass to run.
    """
    place = torch.arange(len(index), device=index.device)
    last = index.new_zeros(len(bank)).scatter_reduce(0, index, place, "amax")[index]
    rows = momentum * bank[index] + (1 - momentum) * vectors.detach()[last]
    return bank.index_copy(0, index, F.normalize(rows, dim=1))


class CRD(nn.Module):
    """The registered loss ``crd``.

    The banks and Z are buffers, changed by forward in training mode alone. Negatives are drawn with replacement: the
    loss is a sum over them, so its expectation is that of distinct ones.
    """

    needs = frozenset({"taps", "index"})
    exact_gradient = False
    """Z of the first batch is a constant for the gradient."""

    def __init__(self, shapes: Shapes, options: CRDOptions) -> None:
        super().__init__()
        self.pair = pairs(shapes)[-1]
        self.temperature, self.momentum = options.temperature, options.momentum
        own, other = shapes.student[self.pair[0]], shapes.teacher[self.pair[1]]
        self.embed_student = nn.Linear(math.prod(own), options.feat_dim)
        self.embed_teacher = nn.Linear(math.prod(other), options.feat_dim)
        for name in ("bank_student", "bank_teacher"):
            self.register_buffer(name, _first(shapes.samples, options.feat_dim))
        self.register_buffer("log_z", torch.full((2,), math.nan))  # NaN until the first batch
        self.negatives = self._index(shapes, options.negatives)

    @classmethod
    def build(cls, shapes: Shapes, options: CRDOptions) -> Self:
        return cls(shapes, options)

    @staticmethod
    def taps(options: CRDOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (options.student,), (options.teacher,)

    def _index(self, shapes: Shapes, wanted: int) -> int:
        """Orders the training split by class, and gives the number of negatives, at most those that any sample has."""
        assert shapes.labels is not None, "a training split has labels"
        counts = shapes.labels.bincount(minlength=shapes.classes)
        tables = {"labels": shapes.labels, "counts": counts, "starts": counts.cumsum(0) - counts}
        for name, table in (tables | {"by_class": shapes.labels.argsort(stable=True)}).items():
            self.register_buffer(name, table, persistent=False)
        others = shapes.samples - int(counts.max())
        if not others:
            raise PlanError("all samples are of one class", where="loss 'crd'", fix="It needs two classes or more.")
        return min(wanted, others)

    def draw(self, index: Tensor) -> Tensor:
        """Positions [B, K] of samples of other classes than those at ``index`` [B], uniform, with replacement."""
        label = self.labels[index][:, None]
        start, own = self.starts[label], self.counts[label]
        places = torch.randint(1 << BITS, (len(index), self.negatives), device=index.device)
        places = places * (len(self.labels) - own) >> BITS
        return self.by_class[places + own * (places >= start)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        own, other = features(student, teacher, self.pair)
        own = F.normalize(self.embed_student(own.flatten(1)), dim=1)
        other = F.normalize(self.embed_teacher(other.flatten(1)), dim=1)
        index = torch.cat([batch.index[:, None], self.draw(batch.index)], dim=1)
        samples = len(self.bank_student)
        both = (
            scores(own, self.bank_teacher, index, self.temperature),
            scores(other, self.bank_student, index, self.temperature),
        )
        first = torch.stack([log_normaliser(part, samples) for part in both])
        log_z = torch.where(self.log_z.isnan(), first, self.log_z)
        if self.training:
            self.log_z = log_z
            self.bank_student = moved(self.bank_student, batch.index, own, self.momentum)
            self.bank_teacher = moved(self.bank_teacher, batch.index, other, self.momentum)
        return contrast(both[0], log_z[0], samples) + contrast(both[1], log_z[1], samples)


def _first(samples: int, width: int) -> Tensor:
    """Random vectors [samples, width] of length about 1."""
    bound = math.sqrt(3 / width)
    return torch.empty(samples, width).uniform_(-bound, bound)
