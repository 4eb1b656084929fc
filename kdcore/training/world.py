"""The processes that train a stage together, and what they tell each other.

Numbers of a step go by the tensors' device (gloo on a CPU, nccl on CUDA); what the hosts agree on goes by gloo always.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Batch
from ..errors import DataError, StorageError
from ..plan import Json

if TYPE_CHECKING:
    from .member import Learner


PATIENCE = 60.0
"""Seconds: NFS asks its server again after so many."""


@dataclass(frozen=True)
class World:
    """One of ``size`` processes; alone, everything here gives back what it is given.

    Args:
        rank: 0 decides, writes and prints.
        size: how many there are.
        talk: the hosts' group, None where there is but one.
    """

    rank: int = 0
    size: int = 1
    talk: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """True for the process that decides, writes and prints."""
        return self.rank == 0

    def span(self, total: int) -> slice:
        """This rank's part of ``total`` things in order; the parts differ by one at most."""
        share, rest = divmod(total, self.size)
        start = self.rank * share + min(self.rank, rest)
        return slice(start, start + share + (self.rank < rest))

    def part(self, batch: Batch) -> Batch:
        """This rank's part of a batch.

        Raises:
            DataError: the batch has fewer samples than there are ranks.
        """
        if self.size == 1:
            return batch
        samples, own = len(batch.inputs), self.span(len(batch.inputs))
        if samples < self.size:
            what = f"a batch of {samples} samples has none for each of {self.size} ranks"
            raise DataError(what, where="data.batch_size", fix="Use a larger one, drop_last = true, or fewer ranks.")
        target = None if batch.target is None else batch.target[own]
        return replace(batch, inputs=batch.inputs[own], target=target, index=batch.index[own])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all(self, tensors: Iterable[Tensor]) -> None:
        """The sums over ranks of many tensors, in place: one message for each dtype, which costs a copy of them."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same in by_dtype.values():
            flat = self.sum(torch.cat([tensor.flatten() for tensor in same]))
            for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def joined(self, part: Tensor, total: int) -> Tensor:
        """[total] bool of the ranks' spans, each [n] bool."""
        if self.size == 1:
            return part
        whole = torch.zeros(total, dtype=torch.uint8, device=part.device)
        whole[self.span(total)] = part.to(torch.uint8)
        return self.sum(whole).bool()

    def any(self, number: int) -> int:
        """The largest number of any rank: a small message between the hosts."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.talk)
        return int(found)

    def see(self, path: Path) -> Path:
        """What another rank has written; a network's file system may take a minute to show it.

        Raises:
            StorageError: it does not.
        """
        end = time.monotonic() + (PATIENCE if self.size > 1 else 0)
        while not path.exists():
            if time.monotonic() > end:
                fix = "All ranks need the same files and the same store: give --store a folder that every machine sees."
                raise StorageError(f"is not there for rank {self.rank}", where=str(path), fix=fix)
            time.sleep(0.2)
        return path

    def of_first(self, value: Json) -> Json:
        """What rank 0 gives, on every rank; JSON."""
        if self.size == 1:
            return value
        data = torch.tensor(list(json.dumps(value).encode() if self.leads else b""), dtype=torch.uint8)
        size = torch.tensor(len(data))
        dist.broadcast(size, 0, group=self.talk)
        data = data if self.leads else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self.talk)
        return value if self.leads else json.loads(bytes(data.tolist()))


ALONE = World()


def sum_gradients(world: World, learner: Learner, share: float) -> None:
    """Adds up a learner's gradients, which backward weighted by the rank's share, in one message a dtype.

    Running statistics of batch normalisation come along and are the mean over ranks then, so that any rank's state is
    the stage's, at any step.
    """
    if world.size == 1:
        return
    moved = list(_running(learner))
    for tensor in moved:
        tensor.mul_(share)
    world.sum_all([p.grad for p in learner.parameters if p.grad is not None] + moved)


def _running(learner: Learner) -> Iterator[Tensor]:
    roots: list[nn.Module] = [learner.module, *(term.module for term in learner.terms)]
    for part in (part for root in roots for part in root.modules()):
        if isinstance(part, _BatchNorm) and part.training and part.running_mean is not None:
            assert part.running_var is not None, "both are there or neither"
            yield from (part.running_mean, part.running_var)
