"""A worker process: jobs as lines on standard input, events and results as lines on standard output."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any, TextIO

from . import errors
from .errors import KdError
from .executor import Context, DataCache, perform
from .job import Job
from .plugins import PluginHost, load_plugins


def main() -> None:
    """Serves jobs until standard input closes, or until SIGTERM."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a plugin prints must not break the protocol
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs: queue.Queue[Job] = queue.Queue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    served: tuple[PluginHost, Context] | None = None
    while not signals:
        try:
            job = jobs.get(timeout=0.1)
        except queue.Empty:
            continue
        if served is None:
            host = load_plugins(job.settings.blocked, job.settings.plugin_files)
            served = host, Context(host.catalog, DataCache(host.catalog), lambda: signals[0] if signals else 0)
        _serve(job, *served, out)
    sys.stdout.flush()
    os._exit(0)  # an orderly end of the interpreter can abort while the other thread holds standard input


def _read(jobs: queue.Queue[Job]) -> None:
    """Queues jobs; at the end of input the driver is gone, and so is this process."""
    for line in sys.stdin:
        jobs.put(Job.from_text(line))
    os._exit(0)


def _serve(job: Job, host: PluginHost, context: Context, out: TextIO) -> None:
    def send(message: Any) -> None:
        try:
            out.write(json.dumps(message) + "\n")
            out.flush()
        except BrokenPipeError:
            os._exit(0)  # the driver is gone

    try:
        with host.blaming():
            result = perform(job, context, send)
        send({"kind": "result", "result": result})
    except Exception as error:
        send(describe(error))


def describe(error: Exception) -> dict[str, Any]:
    """An error as JSON; the driver raises it again."""
    known = isinstance(error, KdError)
    # a plugin's own child of an error of kdcore travels as its parent: what the driver can make again
    kind = next((cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__), type(error))
    return {
        "kind": "error",
        "type": kind.__name__,
        "what": error.what if isinstance(error, KdError) else str(error),
        "where": error.where if isinstance(error, KdError) else "",
        "fix": error.fix if isinstance(error, KdError) else "",
        "signal": getattr(error, "signal_number", 0),
        "notes": list(getattr(error, "__notes__", ())),
        "traceback": "" if known else "".join(traceback.format_exception(error)),
    }


if __name__ == "__main__":
    main()
