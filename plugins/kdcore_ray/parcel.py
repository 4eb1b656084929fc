"""What travels with a stage: text and bytes alone.

A machine of the cluster needs none of the driver's files but the data set, if that is read from files: results that the
stage needs, its last checkpoint, plugin files and weights files go with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kdcore

VERSION = [kdcore.__version__, kdcore.NUMERICS]


def pack_results(store: kdcore.Depot, keys: list[str]) -> bytes:
    """Results as the tar file of ``kdcore store pack``.

    Raises:
        StorageError: one of them is damaged.
    """
    with TemporaryDirectory(prefix="kdcore-") as folder:
        path = Path(folder, "results.tar")
        store.pack(path, keys)
        return path.read_bytes()


def unpack_results(store: kdcore.Depot, data: bytes) -> None:
    """Verifies and commits what :func:`pack_results` gave.

    Raises:
        StorageError: it was damaged on its way, or there is no room.
    """
    with TemporaryDirectory(prefix="kdcore-") as folder:
        path = Path(folder, "results.tar")
        path.write_bytes(data)
        store.unpack(path)


def make_parcel(job: kdcore.Job, store: kdcore.Depot) -> dict[str, Any]:
    """All of a stage but the results that it needs, which other stages may need too."""
    named = [*job.settings.plugin_files, *(ref["weights"] for ref in _models(job.stage) if ref.get("weights"))]
    files = {path: Path(path).read_bytes() for path in named}
    return {**make_letter(job), "files": files, "checkpoint": store.carried(job.key)}


def make_letter(job: kdcore.Job) -> dict[str, Any]:
    """A stage for a machine that sees the driver's files."""
    device = job.settings.device.partition(":")[0]  # Ray shows a stage its own GPU alone
    settings = replace(job.settings, store=str(Path(job.settings.store).resolve()), device=device)
    return {"version": VERSION, "folder": str(Path.cwd()), "job": replace(job, settings=settings).to_text()}


def open_parcel(parcel: dict[str, Any], results: Sequence[bytes], folder: Path) -> kdcore.Job:
    """Puts everything into a new store in ``folder``; the job as it is done there."""
    job = kdcore.Job.from_text(parcel["job"])
    root = folder / "store"
    store = kdcore.open_depot(root)
    for data in results:
        unpack_results(store, data)
    if parcel["checkpoint"] is not None:
        store.adopt_checkpoint(job.key, *parcel["checkpoint"])
    places = {path: _place(path, data, folder / str(n)) for n, (path, data) in enumerate(parcel["files"].items())}
    stage = json.loads(json.dumps(job.stage))
    for ref in _models(stage):
        if ref.get("weights"):
            ref["weights"] = places[ref["weights"]]
    plugin_files = tuple(places[path] for path in job.settings.plugin_files)
    settings = replace(job.settings, store=str(root), plugin_files=plugin_files)
    return replace(job, stage=stage, settings=settings)


def _models(stage: Any) -> Iterator[dict[str, Any]]:
    return (member["model"] for member in stage["members"].values())


def _place(path: str, data: bytes, folder: Path) -> str:
    """Where a file is on this machine: where the driver has it, if it is the same, else a copy."""
    here = Path(path)
    if not (here.is_file() and here.read_bytes() == data):
        folder.mkdir(parents=True)
        here = folder / here.name
        here.write_bytes(data)
    return str(here)
