"""Worker processes for independent stages."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from . import errors
from .errors import DeviceError, Interrupted, KdError
from .job import Emit, Job

TRIES = 3
PATIENCE = 60.0  # seconds in which an interrupted stage must have written its checkpoint


@dataclass
class Worker:
    """A process and what it is at."""

    process: subprocess.Popen[str]
    job: Job | None = None


@dataclass
class Pool:
    """Worker processes that take one job after the other; a dead one's job is tried again from its checkpoint.

    They stay between two calls of :meth:`run`: starting one costs seconds of importing torch.
    """

    size: int
    stopped: Callable[[], int]
    emit: Emit = lambda event: None
    messages: queue.Queue[tuple[Worker, dict[str, Any] | None]] = field(default_factory=queue.Queue)
    workers: list[Worker] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job], emit: Emit) -> Iterator[tuple[str, dict[str, Any]]]:
        """Runs jobs, each after those that it needs; an error, here or in the caller, ends all workers."""
        self.emit = emit
        todo = list(jobs)
        missing = {job.key for job in jobs}
        try:
            while missing:
                self._assign(todo, missing)
                for key, result in self._receive(todo):
                    missing.discard(key)
                    yield key, result
        finally:
            if missing:
                self.close()

    def _assign(self, todo: list[Job], missing: set[str]) -> None:
        for job in [job for job in todo if not set(job.needs) & missing]:
            worker = self._idle(job)
            if worker is None:
                return
            todo.remove(job)
            worker.job = job
            assert worker.process.stdin is not None
            with suppress(OSError):  # it died: the end of its output will say so, and the job is tried again
                worker.process.stdin.write(job.to_text() + "\n")
                worker.process.stdin.flush()

    def _idle(self, job: Job) -> Worker | None:
        for worker in self.workers:
            if worker.job is None:
                return worker
        if len(self.workers) == self.size:
            return None
        worker = Worker(spawn(job.settings.threads))
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        with worker.process.stdout as lines, suppress(ValueError):  # a line that a kill cut is not JSON
            for line in lines:
                self.messages.put((worker, json.loads(line)))
        self.messages.put((worker, None))

    def _receive(self, todo: list[Job]) -> Iterator[tuple[str, dict[str, Any]]]:
        if signal_number := self.stopped():
            raise Interrupted(signal_number)
        worker, message = self._next()
        if worker not in self.workers:
            return  # the last words of one that is buried
        if message is None:
            self._bury(worker, todo)
        elif message["kind"] == "result":
            assert worker.job is not None
            key, worker.job = worker.job.key, None
            yield key, message["result"]
        elif message["kind"] == "error":
            worker.job = None
            raise _error(message)
        else:
            self.emit(message)

    def _next(self) -> tuple[Worker | None, dict[str, Any] | None]:
        try:
            return self.messages.get(timeout=0.1)
        except queue.Empty:  # a process that the worker forked may outlive it and keep its output open
            return next((worker for worker in self.workers if worker.process.poll() is not None), None), None

    def _bury(self, worker: Worker, todo: list[Job]) -> None:
        self.workers.remove(worker)
        code = _end(worker.process, time.monotonic() + 5)
        if worker.job is None:
            return
        job = worker.job
        self.tries[job.key] = self.tries.get(job.key, 0) + 1
        if self.tries[job.key] >= TRIES:
            fix = "If the system killed it, lower --jobs or data.batch_size."
            raise DeviceError(f"its worker died {TRIES} times (exit code {code})", where=f"stage {job.name!r}", fix=fix)
        text = f"the worker died (exit code {code}); {job.name} goes on from its last checkpoint"
        self.emit({"kind": "warning", "text": text, "key": job.key, "name": job.name})
        todo.insert(0, job)

    def close(self) -> None:
        """Ends the workers; a stage that is interrupted by that leaves a checkpoint."""
        for worker in self.workers:
            if worker.job is not None:
                worker.process.send_signal(signal.SIGTERM)
            else:
                _hang_up(worker.process)
        deadline = time.monotonic() + PATIENCE
        for worker in self.workers:
            _end(worker.process, deadline)
        self.workers.clear()


def spawn(threads: int) -> subprocess.Popen[str]:
    """Starts a worker process with so many OpenMP threads."""
    # idle OpenMP threads that spin would steal the cores of the other workers
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    # the driver's own path: with -m, a file like queue.py in the working folder would hide the real one
    program = f"import sys; sys.path[:] = {sys.path!r}; from kdcore.worker import main; main()"
    try:
        return subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the driver alone, which then stops its workers in order
        )
    except OSError as error:
        raise DeviceError(f"cannot start a worker: {error}", where="execute", fix="Lower --jobs.") from error


def _end(process: subprocess.Popen[str], deadline: float) -> int:
    """Waits for the end of a worker, and makes it end at the deadline; returns its exit code."""
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        _hang_up(process)


def _hang_up(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(OSError):  # a dead worker cannot take what is left in the buffer
        process.stdin.close()


def _error(message: dict[str, Any]) -> Exception:
    kind = getattr(errors, str(message["type"]), None)
    if message["type"] == "Interrupted":
        return Interrupted(int(message["signal"]))
    if isinstance(kind, type) and issubclass(kind, KdError):
        error: Exception = kind(message["what"], where=message["where"], fix=message["fix"])
    else:
        error = RuntimeError(f"{message['type']}: {message['what']}\n{message['traceback']}")
    for note in message["notes"]:
        error.add_note(note)
    return error
