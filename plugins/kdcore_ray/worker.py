"""The driver's side of a stage on the cluster: a slot of the pool, with a thread while it is taken."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from signal import SIGTERM
from typing import Any

import ray
from ray.exceptions import RayError

import kdcore

from .cluster import Cluster
from .parcel import make_letter, make_parcel, unpack_results

PENDING = 10.0  # seconds after which a person is told that the cluster has no room


class FailedError(Exception):
    """The stage ended in an error; ``message`` is what its process said."""

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__()
        self.message = message


class DiedError(Exception):
    """The stage's process, actor or machine died; the text says how."""


class RayWorker:
    """See :class:`kdcore.Worker`. Each job gets an actor of its own, so that a slot that rests takes no resources."""

    def __init__(self, cluster: Cluster, stopped: Callable[[], int], job: kdcore.Job, tell: Any) -> None:
        self.cluster, self.stopped, self.tell = cluster, stopped, tell
        self.job: kdcore.Job | None = None
        self.actor: Any = None
        self.begun = self.stopping = False
        self.how = "no reason is known"
        self.thread: threading.Thread | None = None

    def begin(self, job: kdcore.Job) -> None:
        """See :class:`kdcore.Worker`."""
        self.thread = threading.Thread(target=self._serve, args=(job,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """See :class:`kdcore.Worker`."""
        self.stopping = True
        actor = self.actor
        if actor is not None and self.begun:
            actor.stop.remote()
        elif actor is not None:
            ray.kill(actor)

    def ended(self) -> bool:
        """See :class:`kdcore.Worker`: it always tells."""
        return False

    def end(self, deadline: float) -> str:
        """See :class:`kdcore.Worker`. What the stage still sends until then is committed."""
        if self.thread is not None:
            self.thread.join(max(0.0, deadline - time.monotonic()))
            actor = self.actor
            if actor is not None:
                ray.kill(actor)
            self.thread.join(5)
        return self.how

    def _serve(self, job: kdcore.Job) -> None:
        """Tells how the stage ended, whatever happens here: the pool would wait for ever."""
        last: dict[str, Any] | None = None
        try:
            last = self._last(job)
        finally:
            self.tell(self, last)

    def _last(self, job: kdcore.Job) -> dict[str, Any] | None:
        """The last message of a stage: a result, an error, or None if it died."""
        try:
            return {"kind": "result", "result": self._result(job)}
        except FailedError as failed:
            return failed.message
        except (DiedError, RayError) as death:
            self.how = told(death)
            return None
        except Exception as error:
            return dict(kdcore.describe(error))

    def _result(self, job: kdcore.Job) -> dict[str, Any]:
        """Trains under the driver's lease; a shared store's is taken by the worker process."""
        if self.cluster.options.shared:
            return self._answer(job, None, make_letter(job), [])
        return kdcore.under_lease(job, self._signal, partial(self.tell, self), partial(self._ship, job))

    def _signal(self) -> int:
        return self.stopped() or (SIGTERM if self.stopping else 0)

    def _ship(self, job: kdcore.Job, store: kdcore.Depot, send: Any) -> dict[str, Any]:
        return self._answer(job, store, make_parcel(job, store), self.cluster.needed(job, store))

    def _answer(
        self, job: kdcore.Job, store: kdcore.Depot | None, parcel: dict[str, Any], results: list[Any]
    ) -> dict[str, Any]:
        """The result of a stage; what comes before it is told and committed."""
        last: dict[str, Any] = {"kind": "died", "how": "it ended without a result"}
        with closing(self._messages(job, parcel, results, store)) as messages:
            for message in messages:  # to their end: the actor tidies up then
                if message["kind"] in ("result", "error", "died"):
                    last = message
                elif message["kind"] != "begun":
                    self.tell(self, message)
        if last["kind"] == "error":
            raise FailedError(last)
        if last["kind"] == "died":
            raise DiedError(last["how"])
        return dict(last["result"])

    def _messages(
        self, job: kdcore.Job, parcel: dict[str, Any], results: list[Any], store: kdcore.Depot | None
    ) -> Iterator[dict[str, Any]]:
        self.begun, self.actor = False, self.cluster.actor(job)
        try:
            if self._signal():
                raise kdcore.Interrupted(self._signal())
            stream = self.actor.train.options(num_returns="streaming").remote(parcel, *results)
            if not ray.wait([stream], timeout=PENDING)[0]:
                self._tell_pending(job)
            for reference in stream:
                text, attached = ray.get(reference)
                self.begun = True
                yield commit(json.loads(text), attached, job, store)
        finally:
            ray.kill(self.actor)
            self.actor = None

    def _tell_pending(self, job: kdcore.Job) -> None:
        size = self.cluster.size(job)
        text = f"the cluster has no room for it yet ({size}); waiting"
        if not self.cluster.fits(job):
            text = f"no machine of the cluster has {size}; waiting for one that joins it"
        self.tell(self, {"kind": "waiting", "text": text, "key": job.key, "name": job.name})


def told(death: Exception) -> str:
    """How a stage died, in a line: the error that Ray quotes, e.g. where a machine lacks a package, or what it says."""
    lines = [line.strip().rstrip(".") for line in str(death).splitlines() if line.strip()] or [type(death).__name__]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)), lines[0])


def commit(message: dict[str, Any], attached: Any, job: kdcore.Job, store: kdcore.Depot | None) -> dict[str, Any]:
    """Puts what came with a message into the driver's store, verified; the message as it is true here.

    Raises:
        StorageError: it was damaged on its way, or there is no room.
    """
    if store is None or attached is None:
        return message
    if message["kind"] == "checkpoint":
        step, files = attached
        return {**message, "step": step, "path": str(store.adopt_checkpoint(job.key, step, files))}
    unpack_results(store, attached)
    result = store.result(job.key)
    if result is None:
        raise kdcore.StorageError("its result came without it", where=f"stage {job.name!r}", fix="Run it again.")
    return {**message, "result": result}
