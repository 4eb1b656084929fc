"""Executor ``ray``: the stages of a run on the machines of a Ray cluster.

It needs the package ray (the extra ``ray`` of kdcore). What of a stage is done where:

* here, in the process of the run: the store, leases, the journal, the order of stages;
* on a machine of the cluster: an actor with the resources of one stage, and in a process that it starts, the same that
  ``--jobs`` starts here, the training.
"""

from __future__ import annotations

import kdcore

KDCORE_HOOKS = 1


@kdcore.hookimpl
def kdcore_register(registry: kdcore.Registrar) -> None:
    registry.executor("ray", f"{__name__}.executor:RayExecutor", options=f"{__name__}.options:RayOptions",
                      about="the machines of a Ray cluster; needs the extra ray")  # fmt: skip
