"""Data parallel runs: torchrun starts the same command several times, and rank 0 drives the others.

Rank 0 plans, journals, stores and prints. The others follow: they get each stage as the text of a job, train their part
of every batch, write nothing and print nothing. An error of theirs ends rank 0 with it; where rank 0 ends, so do they.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import DeviceError, Interrupted, KdError
from .executor import Context, DataCache, check_unchanged
from .job import Job
from .plugins import PluginHost
from .pool import error_of
from .worker import describe

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from .training.world import World

FOREVER = timedelta(days=365)  # a follower waits for its next job while rank 0 plans, or waits for a lease
ROLL_CALL = 2.0  # seconds in which a rank that lost another tells that it is there itself


@dataclass(frozen=True)
class Ranks:
    """What torchrun says of this process: which of how many it is, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1


def ranks() -> Ranks:
    """From the environment; one process alone where torchrun did not start it."""
    names = {"rank": "RANK", "size": "WORLD_SIZE", "local": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    found = {name: int(os.environ[key]) for name, key in names.items() if key in os.environ}
    return Ranks(**found) if len(found) == len(names) and found["size"] > 1 else Ranks()


def local_device(name: str, own: Ranks) -> str:
    """The device of this rank: each CUDA device of a machine has one."""
    from .training import device

    place = device.resolve(name)
    if own.size == 1 or place.type != "cuda":
        return str(place)
    place = device.resolve(f"cuda:{own.local}")
    device.make_current(place)
    return str(place)


class Team:
    """The processes of a run: the world that stages train in, and notes for what ends it."""

    def __init__(self, world: World, notes: Store) -> None:
        self.world, self.notes = world, notes

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tells the other ranks of an error in the block; one that comes of another's end is raised as what ended it.

        Raises:
            DeviceError: a rank is gone without a word.
        """
        try:
            yield
        except Exception as error:
            if not _is_lost(error):
                self.notes.set("error", json.dumps(describe(error)))
                raise
            raise self._reason() from None

    def _reason(self) -> Exception:
        told = self._told()
        if told is not None:
            return error_of(told)
        names = " and ".join(map(str, self._missing())) or "?"
        fix = "The same command goes on from the last checkpoint."
        return DeviceError(f"no answer from rank {names} of {self.world.size}: it ended", where="torchrun", fix=fix)

    def _missing(self) -> list[int]:
        try:
            self.notes.set(f"here/{self.world.rank}", "")
        except RuntimeError:  # without torchrun, rank 0 has the notes
            return [0]
        time.sleep(ROLL_CALL)
        return [rank for rank in range(self.world.size) if not self._has(f"here/{rank}")]

    def _told(self) -> dict[str, Any] | None:
        return json.loads(self.notes.get("error")) if self._has("error") else None

    def _has(self, note: str) -> bool:
        with suppress(RuntimeError):
            return bool(self.notes.check([note]))
        return False

    def is_first(self) -> bool:
        """True if rank 0 is gone without a word, and this is the first of the others: then it prints what happened."""
        here = [rank for rank in range(self.world.size) if self._has(f"here/{rank}")] or [1]
        return self._told() is None and here[0] == self.world.rank


def _is_lost(error: Exception) -> bool:
    """True if the error says that another rank does not answer; gloo has no class of its own for that."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def join(own: Ranks) -> Team:
    """Meets the other processes.

    Raises:
        DeviceError: they do not come.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from .training.world import World

    try:
        store, _, _ = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own.rank, world_size=own.size)
        talk = dist.new_group(backend="gloo", timeout=FOREVER)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"the {own.size} ranks do not meet: {error}", where="torchrun") from error
    assert isinstance(talk, dist.ProcessGroup)
    return Team(World(own.rank, own.size, talk), PrefixStore("kdcore", store))


@contextmanager
def leading(own: Ranks) -> Iterator[World | None]:
    """The world of rank 0 for a run; the others are dismissed at its end. None where there are no others."""
    if own.size == 1:
        yield None
        return
    import torch.distributed

    team = join(own)
    with team.together():
        yield team.world
        team.world.of_first(None)
    torch.distributed.destroy_process_group()


def follow(host: PluginHost, own: Ranks, catch_signals: Callable[[], Callable[[], int]]) -> NoReturn:
    """Trains what rank 0 trains, until it ends the run; exits as that does."""
    team, code = join(own), 0
    # not before: rank 0 may refuse the recipe and never come, and torchrun ends those that wait by a signal
    stopped = catch_signals()
    try:
        with team.together(), host.blaming():
            _serve(team.world, Context(host.catalog, DataCache(host.catalog), stopped, team.world), own)
    except Exception as error:
        if team.is_first():
            print(f"kdcore: {type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code if isinstance(error, KdError) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly end of the interpreter may wait for a rank that is gone


def _serve(world: World, context: Context, own: Ranks) -> None:
    from .store import Store
    from .training.loop import run_stage

    while (text := world.of_first(None)) is not None:
        job = Job.from_text(str(text))
        job = replace(job, settings=replace(job.settings, device=local_device(job.settings.device, own)))
        check_unchanged(job, context)
        with suppress(Interrupted):  # rank 0 ends the run
            run_stage(
                job, context.catalog, context.load, Store(job.settings.store), lambda event: None, context.stopped,
                world,
            )  # fmt: skip
