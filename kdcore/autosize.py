"""``data.batch_size = "auto"``: settled into a number when a run begins, which its journal keeps."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from .codec import encode
from .errors import DeviceError, StorageError
from .job import Job, Settings
from .journal import FIX, Journal
from .plan import SourceSpec, Stage
from .recipe import AUTO, Recipe, compile_recipe
from .registry import Catalog
from .runview import RunView

LARGEST, SMALLEST = 4096, 2
"""Of a batch, and of a rank's part of one."""
STEPS = 8
"""What an epoch has at least."""
ON_CPU = 256
"""A rank's part there: memory that runs out makes the machine swap, so nothing is tried."""


def settled(
    recipe: Recipe, catalog: Catalog, settings: Settings, load: Callable[[SourceSpec], Any], path: Path
) -> Recipe:
    """The recipe with a number for its batch size: the journal's, or else what is found now.

    Args:
        recipe: a checked recipe.
        catalog: where its names are found.
        settings: the device, how it computes, and the number of ranks; only this one is asked.
        load: the splits of a source.
        path: the run's journal, which need not be there.

    Raises:
        DeviceError: not even the smallest batch fits.
        StorageError: the journal holds no number.
    """
    recipe, is_bound = expected(recipe, catalog, settings, load, path)
    if not is_bound:
        return recipe
    view = compile_recipe(recipe, catalog)[0]
    return _with(recipe, largest(view, catalog, settings, load, view.data.batch_size))


def expected(
    recipe: Recipe, catalog: Catalog, settings: Settings, load: Callable[[SourceSpec], Any], path: Path
) -> tuple[Recipe, bool]:
    """What :func:`settled` gives, as far as that is known without training; True if the number is only its bound."""
    if recipe.data.batch_size != AUTO:
        return recipe, False
    if before := list(Journal(path).of("batch_size")):
        size = before[-1].get("value")
        if not isinstance(size, int) or size < 1:
            raise StorageError(f"batch_size is {size!r}", where=str(path), fix=FIX)
        return _with(recipe, size), False
    view, on_cpu = compile_recipe(recipe, catalog)[0], settings.device.partition(":")[0] == "cpu"
    most = min(LARGEST, len(load(view.data).train) // STEPS, *([ON_CPU * settings.world_size] if on_cpu else []))
    return _with(recipe, _sizes(view, settings, most)[-1]), not on_cpu


def told(recipe: Recipe) -> str:
    """The number that was settled, and that no rate was scaled for it."""
    size = recipe.data.batch_size
    unscaled = recipe.train.lr_batch is None and size != SourceSpec.batch_size
    rate = "; train.lr is taken as it is: train.lr_batch would scale it" if unscaled else ""
    return f"batches of {size} samples{rate}"


def _with(recipe: Recipe, size: int) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"batch_size": size})})


def _sizes(view: RunView, settings: Settings, most: int) -> list[int]:
    """A power of two for each rank, in all up to ``most``; at least one, which may be above."""
    ranks = settings.world_size
    least = ranks * max(SMALLEST, view.data.accumulate)
    sizes = [next(size for n in count() if (size := ranks << n) >= least)]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes


def largest(view: RunView, catalog: Catalog, settings: Settings, load: Callable[[SourceSpec], Any], most: int) -> int:
    """The largest batch up to ``most``, a power of two for each rank, at which the teacher's stage and the student's
    train on the device.

    Raises:
        DeviceError: the smallest does not.
    """
    from .training.trial import fits

    stages, sizes = _stages(view), _sizes(view, settings, most)
    settings = dataclasses.replace(settings, compile=False)  # a graph for each size would take minutes

    def fails(size: int) -> bool:
        jobs = [(_job(stage, size, view.seed, settings), stage.data.cache) for stage in stages]
        return not all(fits(job, catalog, load, cache) for job, cache in jobs)

    fitting = bisect_left(sizes, True, key=fails)
    if not fitting:
        what = f"not even {sizes[0] // settings.world_size} samples fit on {settings.device}"
        raise DeviceError(what, where="data.batch_size", fix="Take smaller models, or write the number.")
    return sizes[fitting - 1]


def _stages(view: RunView) -> list[Stage]:
    """A teacher on labels, and a student under it; both with fresh weights, which take as much memory."""
    teacher = view.label_only("teacher", view.teacher)
    student = dataclasses.replace(view, controllers=()).distilled(view.student, teacher["teacher"])
    members = {name: dataclasses.replace(member, init=None) for name, member in student.members.items()}
    return [stage for stage in (teacher, dataclasses.replace(student, members=members)) if stage.length]


def _job(stage: Stage, size: int, seed: int, settings: Settings) -> Job:
    data = dataclasses.replace(stage.data, batch_size=size, cache=None)
    encoded = encode(dataclasses.replace(stage, data=data), str)
    return Job("", stage.name, {"seed": seed, **encoded}, (), None, settings)
