"""What this machine brings to a run: how it executes a recipe, and what a process needs for that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .executor import Context, DataCache
from .job import Settings
from .plan import Spec
from .plugins import PluginHost
from .ranks import local_device, ranks
from .recipe import Recipe

if TYPE_CHECKING:
    from .training.world import World


def make_settings(
    recipe: Recipe,
    store: Path,
    jobs: int,
    *,
    threads: int | None = None,
    strict: bool = False,
    plugin_files: tuple[str, ...] = (),
    blocked: tuple[str, ...] = (),
) -> Settings:
    """How this machine executes a recipe: device and threads are settled here.

    ``threads`` is what a resumed run began with; a recipe that fixes threads counts for more.
    """
    from .training import device

    own = ranks()
    return Settings(
        store=str(store),
        device=local_device(recipe.device, own),
        threads=recipe.threads or threads or device.default_threads(jobs * own.local_size),
        precision=recipe.precision,
        channels_last=recipe.channels_last,
        compile=recipe.compile,
        world_size=own.size,
        log_every=recipe.execute.log_every,
        checkpoint_seconds=recipe.execute.checkpoint_seconds,
        workers=device.default_workers(jobs * own.local_size) if recipe.data.workers is None else recipe.data.workers,
        strict=strict,
        failure=Spec(recipe.execute.failure.name, recipe.execute.failure.extras),
        plugin_files=plugin_files,
        blocked=blocked,
    )


def make_context(host: PluginHost, stopped: Any = lambda: 0, world: World | None = None) -> Context:
    """What this process needs to run stages of the host's plugins."""
    return Context(host.catalog, DataCache(host.catalog), stopped, world)
