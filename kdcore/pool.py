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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from . import errors
from .errors import DeviceError, Interrupted, KdError
from .job import Emit, Job

TRIES = 3
PATIENCE = 60.0  # seconds in which an interrupted stage must have written its checkpoint

Message: TypeAlias = Mapping[str, Any]
Tell: TypeAlias = "Callable[[Worker, Message | None], None]"


class Worker(Protocol):
    """What a :class:`Pool` gives stages to, one at a time: a process of this machine, or what stands for one elsewhere.

    It is constructed with its first job and with ``tell``, which it calls, in any thread, with itself and a message:
    an event of its stage, ``{"kind": "result", "result": ...}``, what :func:`kdcore.describe` made of an error, or None
    when it is dead.
    """

    job: Job | None
    """What it is at; the pool sets it."""

    def begin(self, job: Job) -> None:
        """Takes a job. It raises nothing where it died meanwhile: it tells so."""
        ...

    def stop(self) -> None:
        """Asks it to end; a stage that is interrupted by that leaves a checkpoint."""
        ...

    def ended(self) -> bool:
        """True if it is dead though it may never tell."""
        ...

    def end(self, deadline: float) -> str:
        """Waits for its end, and makes it end at the deadline of ``time.monotonic``; says how it ended."""
        ...


class WorkerProcess:
    """A worker process of this machine: see :class:`Worker`."""

    def __init__(self, job: Job, tell: Tell) -> None:
        self.job: Job | None = None
        self.tell = tell
        self.process = spawn(job.settings.threads)
        threading.Thread(target=self._listen, daemon=True).start()

    def begin(self, job: Job) -> None:
        """See :class:`Worker`."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it died: the end of its output will say so, and the job is tried again
            self.process.stdin.write(job.to_text() + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        """See :class:`Worker`."""
        if self.job is not None:
            self.process.send_signal(signal.SIGTERM)
        else:
            self._hang_up()

    def ended(self) -> bool:
        """See :class:`Worker`: a process that it forked may outlive it and keep its output open."""
        return self.process.poll() is not None

    def end(self, deadline: float) -> str:
        """See :class:`Worker`."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
        finally:
            self._hang_up()
        return f"exit code {self.process.wait()}"

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines, suppress(ValueError):  # a line that a kill cut is not JSON
            for line in lines:
                self.tell(self, json.loads(line))
        self.tell(self, None)

    def _hang_up(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # a dead worker cannot take what is left in the buffer
            self.process.stdin.close()


@dataclass
class Pool:
    """Workers that take one job after the other; a dead one's job is tried again from its checkpoint.

    They stay between two calls of :meth:`run`: starting one costs seconds of importing torch.

    Args:
        size: workers at once.
        stopped: a signal number if the driver was asked to stop, else 0.
        start: makes a :class:`Worker`.
        most: how often a stage is begun whose workers die.
    """

    size: int
    stopped: Callable[[], int]
    start: Callable[[Job, Tell], Worker] = WorkerProcess
    most: int = TRIES
    emit: Emit = field(default=lambda event: None, init=False)
    messages: queue.Queue[tuple[Worker, Message | None]] = field(default_factory=queue.Queue, init=False)
    workers: list[Worker] = field(default_factory=list, init=False)
    tries: dict[str, int] = field(default_factory=dict, init=False)

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
            worker.begin(job)

    def _idle(self, job: Job) -> Worker | None:
        for worker in self.workers:
            if worker.job is None:
                return worker
        if len(self.workers) == self.size:
            return None
        worker = self.start(job, lambda worker, message: self.messages.put((worker, message)))
        self.workers.append(worker)
        return worker

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
            raise error_of(message)
        else:
            self.emit(message)

    def _next(self) -> tuple[Worker | None, Message | None]:
        try:
            return self.messages.get(timeout=0.1)
        except queue.Empty:
            return next((worker for worker in self.workers if worker.ended()), None), None

    def _bury(self, worker: Worker, todo: list[Job]) -> None:
        self.workers.remove(worker)
        how = worker.end(time.monotonic() + 5)
        if worker.job is None:
            return
        job = worker.job
        self.tries[job.key] = self.tries.get(job.key, 0) + 1
        if self.tries[job.key] >= self.most:
            fix = "If the system killed it, lower --jobs or data.batch_size."
            raise DeviceError(f"its worker died {self.most} times ({how})", where=f"stage {job.name!r}", fix=fix)
        text = f"the worker died ({how}); {job.name} goes on from its last checkpoint"
        self.emit({"kind": "warning", "text": text, "key": job.key, "name": job.name})
        todo.insert(0, job)

    def close(self) -> None:
        """Ends the workers; a stage that is interrupted by that leaves a checkpoint."""
        for worker in self.workers:
            worker.stop()
        deadline = time.monotonic() + PATIENCE
        for worker in self.workers:
            worker.end(deadline)
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


def error_of(message: Message) -> Exception:
    """The error that another process described."""
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
