"""Runs stages: in this process, or several at once in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .codec import canonical, decode, encode
from .errors import DataError, Interrupted, PluginError
from .job import Emit, Job
from .keys import code_of
from .options import Options
from .plan import SourceSpec
from .pool import Pool
from .registry import Catalog
from .store import Store
from .stored import check_stored

if TYPE_CHECKING:
    from .training.world import World


class Executor(Protocol):
    """What ``[execute] name`` chooses. Constructed with its options, a :class:`Context` and the number of jobs."""

    def execute(self, jobs: Sequence[Job], emit: Emit) -> Iterator[tuple[str, dict[str, Any]]]:
        """Runs jobs, which come after those that they need, and yields (key, content of result.json) as they end.

        ``emit`` brings events to the driver, each with the ``key`` and ``name`` of its stage. A run calls this once for
        every list of stages that its strategy yields.
        """
        ...

    def close(self) -> None:
        """Called once, at the end of the run."""
        ...


class DataCache:
    """Data sets of a process, each loaded and checked once."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._loaded: dict[str, Any] = {}

    def __call__(self, source: SourceSpec) -> Any:
        """The splits of a source: :class:`kdcore.data.Splits`."""
        from .data import load_splits

        spec = source.dataset
        key = canonical(encode([spec, source.monitor, source.split_seed], str))
        if key not in self._loaded:
            entry = self.catalog.find("dataset", spec.name)
            options = entry.options_class()(**spec.options)
            self._loaded[key] = load_splits(
                entry.load(), options, monitor=source.monitor, split_seed=source.split_seed, name=entry.name
            )
        return self._loaded[key]


@dataclass
class Context:
    """What a process needs to run jobs."""

    catalog: Catalog
    load: DataCache
    stopped: Callable[[], int] = lambda: 0
    world: World | None = None  # of a data parallel run


def perform(job: Job, context: Context, emit: Emit) -> dict[str, Any]:
    """Runs one job under its lease; a result that another process made meanwhile is used."""
    from .training.loop import run_stage

    def train(store: Store, send: Emit) -> dict[str, Any]:
        check_unchanged(job, context)
        if context.world is not None:
            context.world.of_first(job.to_text())
        return run_stage(job, context.catalog, context.load, store, send, context.stopped, context.world)

    return under_lease(job, context.stopped, emit, train)


def under_lease(
    job: Job, stopped: Callable[[], int], emit: Emit, train: Callable[[Store, Emit], dict[str, Any]]
) -> dict[str, Any]:
    """A job's result: what another process made meanwhile, or what ``train`` makes while this one holds the lease.

    Args:
        job: whose key is leased in its store.
        stopped: a signal number if the process was asked to stop, else 0.
        emit: gets the events with the job's key and name.
        train: gets the store, of which plugins know :class:`kdcore.Depot`, and what adds key and name to its events;
            commits the result and returns it.

    Raises:
        Interrupted: it was asked to stop before it began.
    """

    def send(event: Any) -> None:
        emit({**event, "key": job.key, "name": job.name})

    told: list[str] = []

    def check(holder: str = "") -> None:
        if signal_number := stopped():
            raise Interrupted(signal_number)
        if holder and not told:
            told.append(holder)
            send({"kind": "waiting", "text": f"{holder} trains this stage; waiting for its result"})

    check()  # a signal that came at the end of another stage: do not begin this one
    store = Store(job.settings.store, lambda text: send({"kind": "warning", "text": text}))
    with store.lease(job.key, check):
        if (found := store.result(job.key)) is not None:
            return {**check_stored(found, job.key), "reused": True}
        made = train(store, send)
        store.forget(job.key)  # a result that came from another machine left them
        return made


def check_unchanged(job: Job, context: Context) -> None:
    """Refuses a job whose plugins or data were edited since its key was made: its result would lie under that key."""
    stage, where = decode(job.name, job.stage), f"stage {job.name!r}"
    changed = [code["plugin"] for code in code_of(stage, context.catalog) if code not in job.code]
    if changed:
        fix = "Run the same command again: it takes the new code."
        raise PluginError(f"plugin {changed[0]!r} was edited while the run went on", where=where, fix=fix)
    if job.data and job.data != context.load(stage.data).fingerprint:
        fix = "Run the same command again: it takes the data as they are now."
        raise DataError("its data changed while the run went on", where=where, fix=fix)


class LocalExecutor:
    """One process with one job, worker processes with more; they stay for the whole run."""

    Options = Options

    def __init__(self, options: Any, context: Context, jobs: int) -> None:
        self.context = context
        self.pool = Pool(jobs, context.stopped) if jobs > 1 else None

    def execute(self, jobs: Sequence[Job], emit: Emit) -> Iterator[tuple[str, dict[str, Any]]]:
        """See :class:`Executor`."""
        if self.pool is not None:
            yield from self.pool.run(jobs, emit)
            return
        for job in jobs:
            yield job.key, perform(job, self.context, emit)

    def close(self) -> None:
        """Ends the workers."""
        if self.pool is not None:
            self.pool.close()
