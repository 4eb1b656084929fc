"""The actor on a machine of the cluster: it starts a worker process for one stage and passes on what that says.

It imports neither torch nor plugins, and answers in text and bytes.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import kdcore

from .parcel import VERSION, open_parcel, pack_results

Answer: TypeAlias = tuple[str, Any]
"""A message as JSON, and what comes with it: a packed result, or step and files of a checkpoint."""


class Remote:
    """Trains one stage; ``stop`` is called in another thread."""

    def __init__(self) -> None:
        self.worker: kdcore.WorkerProcess | None = None

    def train(self, parcel: dict[str, Any], *results: bytes) -> Iterator[Answer]:
        """Gives the worker's messages; what they say of files comes with them.

        Args:
            parcel: of :func:`make_parcel`, or of :func:`make_letter` for a shared store.
            results: that the stage needs, packed.
        """
        try:
            with TemporaryDirectory(prefix="kdcore-") as folder:
                yield from self._train(parcel, results, Path(folder))
        except Exception as error:
            yield json.dumps(kdcore.describe(error)), None

    def _train(self, parcel: dict[str, Any], results: tuple[bytes, ...], folder: Path) -> Iterator[Answer]:
        if parcel["version"] != VERSION:
            what = f"the run has kdcore {parcel['version'][0]}, {socket.gethostname()} has {VERSION[0]}"
            raise kdcore.PluginError(what, where="execute", fix="Install the same one on all machines.")
        if Path(parcel["folder"]).is_dir():
            os.chdir(parcel["folder"])  # paths of data sets are relative to it
        if "files" not in parcel:
            yield from self._messages(kdcore.Job.from_text(parcel["job"]))
            return
        job = open_parcel(parcel, results, folder)
        with closing(self._messages(job)) as answers:
            yield from attached(answers, job)

    def _messages(self, job: kdcore.Job) -> Iterator[Answer]:
        """Messages of a worker process, first that it began, last a result, an error, or how it died."""
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.worker = worker = kdcore.WorkerProcess(job, lambda worker, message: messages.put(message))
        try:
            worker.job = job
            worker.begin(job)
            message = {"kind": "begun"}
            while message is not None:
                yield json.dumps(message), None
                if message["kind"] in ("result", "error"):
                    return
                message = messages.get()
            yield json.dumps({"kind": "died", "how": worker.end(time.monotonic())}), None
        finally:
            worker.job = None
            worker.stop()
            worker.end(time.monotonic() + 5)

    def stop(self) -> None:
        """Asks the stage to end after a checkpoint."""
        if self.worker is not None:
            self.worker.stop()


def attached(answers: Iterator[Answer], job: kdcore.Job) -> Iterator[Answer]:
    """Adds what the driver commits to its own store: checkpoints, each once, and the result."""
    store, sent = kdcore.open_depot(job.settings.store), -1
    for text, _ in answers:
        kind = json.loads(text)["kind"]
        if kind == "checkpoint":
            found = store.carried(job.key)  # the newest: the worker does not wait for us
            if found is not None and found[0] > sent:
                sent = found[0]
                yield text, found
        else:
            yield text, pack_results(store, [job.key]) if kind == "result" else None
