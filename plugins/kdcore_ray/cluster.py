"""The cluster: joined or started, the results that lie in its object store, and actors of the right size."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

import kdcore

from .options import RayOptions
from .parcel import pack_results
from .remote import Remote


class Cluster:
    """A connection to a cluster, which is left as it was found.

    Raises:
        DeviceError: there is none at the address.
    """

    def __init__(self, options: RayOptions) -> None:
        self.options = options
        self.results: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.joined = not ray.is_initialized()  # else the caller's program did, and leaves it when it likes
        self.started = self.joined and options.address == "local"
        if self.joined:
            connect(options.address)

    def needed(self, job: kdcore.Job, store: kdcore.Depot) -> list[Any]:
        """The results that a job needs, each put into the object store once a run, however many stages need it."""
        with self.lock:
            for key in job.needs:
                if key not in self.results:
                    self.results[key] = ray.put(pack_results(store, [key]))
            return [self.results[key] for key in job.needs]

    def resources(self, job: kdcore.Job) -> dict[str, float]:
        """What Ray counts for a stage."""
        cpus, gpus = self.options.cpus, self.options.gpus
        return {
            "num_cpus": job.settings.threads if cpus is None else cpus,
            "num_gpus": float(job.settings.device.startswith("cuda")) if gpus is None else gpus,
        }

    def actor(self, job: kdcore.Job) -> Any:
        """An actor for one stage; it begins when a machine has room, and ``ray.kill`` gives that back.

        Raises:
            DeviceError: a cluster of this machine alone, which is too small.
        """
        if self.started and not self.fits(job):
            what = f"this machine is too small for the stage's {self.size(job)}"
            fix = "Lower threads, execute.cpus or execute.gpus, or name a cluster: execute.address."
            raise kdcore.DeviceError(what, where=f"stage {job.name!r}", fix=fix)
        return ray.remote(Remote).options(max_concurrency=2, **self.resources(job)).remote()

    def fits(self, job: kdcore.Job) -> bool:
        """True if a machine of the cluster is as large as a stage, though it may have no room now."""
        needs = [(name.removeprefix("num_")[:-1].upper(), value) for name, value in self.resources(job).items()]
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return any(all(machine.get(name, 0) >= value for name, value in needs) for machine in machines)

    def size(self, job: kdcore.Job) -> str:
        """What Ray counts for a stage, for people."""
        return "{num_cpus:g} CPUs and {num_gpus:g} GPUs".format(**self.resources(job))

    def close(self) -> None:
        """Leaves the cluster; one that was started for the run ends."""
        self.results.clear()
        if self.joined:
            ray.shutdown()


def connect(address: str) -> None:
    """Joins a cluster, or starts one.

    Raises:
        RecipeError: a Ray client's address.
        DeviceError: no cluster answers there.
    """
    if address.startswith("ray://"):
        fix = 'Start the run on a machine of the cluster, with address = "auto".'
        raise kdcore.RecipeError(f"{address!r} is for Ray clients", where="execute.address", fix=fix)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody who starts a run has agreed to reports
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        with kept_handler():
            ray.init(address=address, logging_level="ERROR", **local)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        fix = "Start one with `ray start --head`, or leave address out."
        raise kdcore.DeviceError(f"no Ray cluster: {error}", where="execute.address", fix=fix) from error


@contextmanager
def kept_handler() -> Iterator[None]:
    """Gives SIGTERM back to the run: Ray would end the process without a checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(ValueError):  # not in the main thread, where Ray could not take it either
            signal.signal(signal.SIGTERM, before)
