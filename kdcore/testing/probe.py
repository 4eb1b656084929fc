"""What importing and registering a plugin does to a fresh process; run as ``python -m kdcore.testing.probe``.

Reads the plugin's module name, or the path of its file, from the first argument. Prints one line of JSON, marked, after
whatever the plugin itself printed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy  # before the plugin may: a generator that nobody imported yet has no state to compare

MARK = "kdcore-probe:"
HEAVY = ("torch", "torchvision", "matplotlib", "sklearn")


def state() -> dict[str, Any]:
    """What a plugin should find as it left it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    twister = numpy.random.get_state(legacy=False)["state"]
    return {
        "working folder": os.getcwd(),
        "environment": dict(os.environ),
        "module search path": list(sys.path),
        "random numbers": hash((random.getstate(), twister["key"].tobytes(), twister["pos"])),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "signal handlers": [str(signal.getsignal(number)) for number in numbers],
    }


def main(plugin: str) -> None:
    """Imports the plugin, calls its ``kdcore_register`` twice, and prints what changed and what was imported."""
    from kdcore.finding import load_file
    from kdcore.origin import Origin
    from kdcore.registry import Registrar

    before = state()
    module = load_file(Path(plugin)) if plugin.endswith(".py") else importlib.import_module(plugin)
    if hasattr(module, "kdcore_register"):
        module.kdcore_register(Registrar(Origin("probed")))
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    heavy = [name for name in HEAVY if name in sys.modules]
    print(f"\n{MARK}{json.dumps({'changed': changed, 'imported': heavy})}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
