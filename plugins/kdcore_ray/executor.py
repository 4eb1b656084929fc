"""The executor: a pool whose workers are slots for stages on the cluster."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import kdcore

from .options import RayOptions


class RayExecutor:
    """See :class:`kdcore.Executor`.

    Raises:
        PluginError: Ray is not installed.
        DeviceError: there is no cluster at the address.
    """

    def __init__(self, options: RayOptions, context: kdcore.Context, jobs: int) -> None:
        if find_spec("ray") is None:
            fix = "Write: pip install 'kdcore[ray]', here and on the machines of the cluster."
            raise kdcore.PluginError("Ray is not installed", where="execute.name", fix=fix)
        if options.address == "local" and "ray" not in sys.modules:
            ask_for_token()
        from .cluster import Cluster
        from .worker import RayWorker

        self.cluster = Cluster(options)
        start = partial(RayWorker, self.cluster, context.stopped)
        self.pool = kdcore.Pool(jobs, context.stopped, start, options.tries)

    def execute(self, jobs: Sequence[kdcore.Job], emit: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """See :class:`kdcore.Executor`."""
        yield from self.pool.run(jobs, emit)

    def close(self) -> None:
        """Ends the stages, each after a checkpoint, and leaves the cluster."""
        self.pool.close()
        self.cluster.close()


def ask_for_token() -> None:
    """Lets a new cluster, whose ports the whole network sees, take orders of this process and its children alone.

    Ray knows it from 2.52 on, reads it as it is imported, and keeps it as long as the process lives. So does the
    environment: a second run's cluster has the same token.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
