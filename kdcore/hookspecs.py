"""The contract with plugins.

A plugin is a module (or package) named by an entry point of the group ``kdcore``::

    # pyproject.toml of your distribution
    [project.entry-points.kdcore]
    acme = "kdcore_acme"

    # kdcore_acme.py
    import kdcore

    @kdcore.hookimpl
    def kdcore_register(registry):
        registry.strategy("born-again", "kdcore_acme_impl:BornAgain")

It may implement any of the hooks below, and only those; take the arguments you need and leave out the others.
A module may state the version it was written for: ``KDCORE_HOOKS = 2``. A newer one than the host's is refused.

Nothing acts on a run because it is installed: what a plugin registers is used when a recipe names it, and observers
see plain numbers that they cannot change. Hooks run in the driving process only; worker processes call
``kdcore_register`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from .registry import Registrar

HOOKS_VERSION = 2
"""Raised when a hook or a registrar method changes in a way that an existing plugin can notice."""

hookspec = pluggy.HookspecMarker("kdcore")
hookimpl = pluggy.HookimplMarker("kdcore")


# ---------------------------------------------------------------- registration


@hookspec
def kdcore_register(registry: Registrar) -> None:
    """Registers what the plugin offers. Called once a process, plugins sorted by name.

    ``registry`` is bound to this plugin, so that every name keeps its provenance. Each method takes the object or
    ``"package.module:Name"``, which is imported at first use: with that form ``kdcore plugins`` and the check of a
    recipe stay free of torch. If the hook raises, nothing of the plugin is registered.
    """


# ---------------------------------------------------------------- observers
# The return value is ignored. One that raises is reported once and muted for the rest of the run
# (``--strict-plugins`` makes it fatal); the report lists it. ``run`` is a mapping of plain values: id, dir and seed;
# ``stage`` is one with key, name, members and length.


@hookspec
def kdcore_run_started(run: Mapping[str, Any]) -> None:
    """Before the first stage is asked for."""


@hookspec
def kdcore_run_finished(run: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
    """After the result is written. ``outcome`` is the content of result.json."""


@hookspec
def kdcore_stage_started(run: Mapping[str, Any], stage: Mapping[str, Any]) -> None:
    """A stage begins or goes on from a checkpoint. Not called for a result that is reused."""


@hookspec
def kdcore_stage_finished(run: Mapping[str, Any], stage: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """A stage's result is in the store and the journal. ``result["reused"]`` says that it was there before."""


@hookspec
def kdcore_epoch_finished(
    run: Mapping[str, Any], stage: Mapping[str, Any], epoch: float, metrics: Mapping[str, Mapping[str, float]]
) -> None:
    """A tick is over (an epoch, or n steps of a stream). ``metrics``: member -> name -> value."""


@hookspec
def kdcore_log_line(run: Mapping[str, Any], stage: Mapping[str, Any], step: int, metrics: Mapping[str, float]) -> None:
    """After the one copy to the host of a log interval: the mean of every term, and images a second."""


@hookspec
def kdcore_checkpoint_saved(run: Mapping[str, Any], stage: Mapping[str, Any], step: int, path: str) -> None:
    """A checkpoint is complete and durable at ``path``."""
