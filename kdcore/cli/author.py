"""``kdcore new-plugin`` and ``kdcore check-plugin``: what an author of plugins uses."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import PluginError, RecipeError
from ..plugins import PluginHost
from ..scaffold import check_name, write

STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}


def create(name: str, kinds: list[str], parent: Path, host: PluginHost) -> None:
    """Writes a new plugin's package and prints what to do next."""
    if len(kinds) > 1:
        wanted = " ".join(f"--{kind}" for kind in kinds)
        raise RecipeError(f"{wanted}: one kind a package", where=f"new-plugin {name}", fix="Register others in it.")
    package = check_name(name, kinds[0] if kinds else "strategy", host)
    folder = write(package, parent)
    print(f"The {package.kind} {package.plugin!r}, its test and a recipe lie in {folder}. Next:\n")
    print(f"  cd {shlex.quote(str(folder))}")
    print('  pip install -e ".[test]"')
    print("  pytest")
    print(f"  kdcore check-plugin {package.plugin}")
    print("  kdcore run recipe.toml")


def check(plugin: str | ModuleType) -> None:
    """Runs every check of all that a plugin registers and prints a table.

    Raises:
        PluginError: no such plugin, a broken one, or checks that failed.
    """
    from ..testing import subjects_of, verdicts

    found = [(subject, verdict) for subject in subjects_of(plugin) for verdict in verdicts(subject)]
    table = Table("subject", "check", "result", "why")
    for subject, verdict in found:
        state = Text(verdict.state, STYLES[verdict.state])
        table.add_row(Text(str(subject)), Text(verdict.check.name), state, Text(verdict.reason))
    Console().print(table)
    failed = [f"{subject}-{verdict.check.name}" for subject, verdict in found if verdict.state == "failed"]
    if failed:
        what = f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}"
        raise PluginError(
            what, where="check-plugin", fix="The table says why, docs/plugin-reference.md what they hold."
        )
    skipped = sum(verdict.state == "skipped" for _, verdict in found)
    print(f"{len(found) - skipped} checks passed, {skipped} do not apply")
