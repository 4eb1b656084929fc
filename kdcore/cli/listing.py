"""``kdcore plugins``: what every plugin offers, and which ones are broken."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import hookspecs, tables
from ..errors import RecipeError, suggest
from ..origin import Origin
from ..plugins import PluginHost
from ..registry import Entry

TABLES: dict[str, type[tables.Table]] = {
    "loss": tables.ObjectiveTable, "model": tables.ModelTable, "dataset": tables.DataTable,
    "executor": tables.ExecuteTable,
}  # fmt: skip
"""Tables of a recipe that have keys beside the options of what they name."""


def show(host: PluginHost, kind: str | None = None, plugin: str | None = None) -> None:
    """Prints one row a kind and plugin, then one line a broken plugin.

    Args:
        host: what is loaded.
        kind: show this one alone.
        plugin: show what this one registers alone.

    Raises:
        RecipeError: there is no such kind.
    """
    kinds = [*host.catalog.entries, "observer"]
    if kind is not None and kind.replace(" ", "_") not in kinds:
        raise RecipeError(f"no kind {kind!r}", where="--kind", fix=suggest(kind, kinds))
    table = Table("kind", "plugin", "names", show_lines=True)
    for found, origin, names in _rows(host):
        if kind in (None, found, found.replace("_", " ")) and plugin in (None, origin.plugin):
            table.add_row(found.replace("_", " "), Text(str(origin)), names)
    console = Console()
    console.print(table)
    for name, reason in host.broken.items():  # soft_wrap: a line of its own in a pipe, whatever its length
        if plugin in (None, name):
            console.print(f"BROKEN  {reason}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def show_name(host: PluginHost, name: str, kind: str | None = None) -> None:
    """Prints every option of what has this name: type, default, and what to write; or all that a plugin registers."""
    plugin, _, short = name.rpartition("/")
    found = [e for kind in host.catalog.entries for e in host.catalog.all(kind) if e.name == short]
    found = [e for e in found if plugin in ("", e.origin.plugin) and kind in (None, e.kind)]
    if not found and name in (*host.origins, *host.broken):
        show(host, kind, name)
        return
    if not found:
        known = [entry.name for kind in host.catalog.entries for entry in host.catalog.all(kind)]
        fix = suggest(name, [*known, *host.origins])
        raise RecipeError(f"nothing is called {name!r}", where="kdcore plugins", fix=fix)
    for entry in found:
        table = Table("option", "type", "default", "what to write", title=f"{entry.kind} {entry.full_name}")
        for option, field in entry.options_class().model_fields.items():
            table.add_row(*_words(option, field))
        common = TABLES.get(entry.kind)
        if common is not None:
            table.add_section()
            table.caption = (
                f"The last {len(common.model_fields) - 1} are keys of its table in a recipe, whatever it names."
            )
            for key, field in common.model_fields.items():
                if key != common.name_key:
                    table.add_row(*_words(key, field))
        Console().print(table if table.rows else f"{entry.kind} {entry.full_name} takes no options")


def _words(key: str, field: FieldInfo) -> Iterator[Text]:
    """A row of the table of options."""
    default = field.default.name if isinstance(field.default, tables.Named) else field.default
    kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
    texts = (key, kind, "required" if field.is_required() else str(default), field.description or "")
    return (Text(text) for text in texts)


def _rows(host: PluginHost) -> Iterator[tuple[str, Origin, Text]]:
    for kind in host.catalog.entries:
        by_plugin: dict[Origin, list[Entry]] = {}
        for entry in host.catalog.all(kind):
            by_plugin.setdefault(entry.origin, []).append(entry)
        yield from ((kind, plugin, _names(entries)) for plugin, entries in by_plugin.items())
    for plugin, hooks in _observers(host).items():
        yield "observer", plugin, Text(", ".join(hooks))


def _names(entries: list[Entry]) -> Text:
    """One paragraph for all names that share a description, so that 80 torchvision models take one."""
    by_about: dict[str, list[str]] = {}
    for entry in entries:
        by_about.setdefault(entry.about, []).append(entry.name)
    text = Text()
    for number, (about, names) in enumerate(sorted(by_about.items(), key=lambda item: len(item[1]))):
        text.append("\n" if number else "")
        text.append(", ".join(names), style="bold")
        text.append(f": {about}" if about else "")
    return text


def _observers(host: PluginHost) -> dict[Origin, list[str]]:
    found: dict[Origin, list[str]] = {}
    for hook in vars(hookspecs):
        if hook.startswith("kdcore_") and hook != "kdcore_register":
            for impl in getattr(host.manager.hook, hook).get_hookimpls():
                found.setdefault(host.origins[impl.plugin_name], []).append(hook)
    return found
