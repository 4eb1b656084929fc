"""The plugins of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import PluginError, RecipeError, suggest
from ..origin import Origin
from ..plugins import CORE, PluginHost, load_plugins


def load_host(
    blocked: Sequence[str], files: Sequence[str], strict: bool = False, objects: Iterable[tuple[Origin, Any]] = ()
) -> PluginHost:
    """The plugins of a run. What was asked for by name must be there; what is merely installed may be broken.

    Raises:
        RecipeError: a name to leave out is none.
        PluginError: a file or an object is no working plugin; says why.
    """
    objects = list(objects)
    host = load_plugins(blocked, files, strict, objects)
    for name in blocked:
        if name not in host.left_out:
            known = {*host.origins, *host.broken, *host.left_out} - {CORE}
            raise RecipeError(f"no plugin {name!r} to leave out", where=f"-p no:{name}", fix=suggest(name, known))
    for file in files:
        path = Path(file).resolve()
        loaded = any(path in origin.files for origin in host.origins.values())
        if not loaded and path.stem not in host.left_out:
            reason = next(text for name, text in host.broken.items() if name in (path.stem, f"{path.stem} {path}"))
            raise PluginError(reason, where=f"--plugin-file {file}", fix="Repair it, or leave the option out.")
    for origin, _ in objects:
        if broken := host.broken.get(origin.plugin) or host.broken.get(str(host.origins.get(origin.plugin))):
            raise PluginError(broken, where="plugins", fix="Repair it, or leave it out.")
    return host
