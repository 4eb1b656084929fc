"""``kdcore plugins``: what every plugin offers, and which ones are broken."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import hookspecs
from ..errors import RecipeError, suggest
from ..plugins import PluginHost
from ..registry import Entry


def show(host: PluginHost) -> None:
    """Prints one row a kind and plugin, then one line a broken plugin."""
    table = Table("kind", "plugin", "names", show_lines=True)
    for kind, plugin, names in _rows(host):
        table.add_row(kind.replace("_", " "), Text(plugin), names)
    console = Console()
    console.print(table)
    for reason in host.broken.values():  # soft_wrap: a line of its own in a pipe, whatever its length
        console.print(f"BROKEN  {reason}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def show_options(host: PluginHost, name: str) -> None:
    """Prints every option of what has this name: type, default, and what to write."""
    plugin, _, short = name.rpartition("/")
    found = [e for kind in host.catalog.entries for e in host.catalog.all(kind) if e.name == short]
    found = [entry for entry in found if plugin in ("", entry.origin.plugin)]
    if not found:
        known = [entry.name for kind in host.catalog.entries for entry in host.catalog.all(kind)]
        raise RecipeError(f"nothing is called {name!r}", where="kdcore plugins", fix=suggest(name, known))
    for entry in found:
        table = Table("option", "type", "default", "what to write", title=f"{entry.kind} {entry.full_name}")
        for option, field in entry.options_class().model_fields.items():
            default = "required" if field.is_required() else str(field.default)
            kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
            table.add_row(*(Text(text) for text in (option, kind, default, field.description or "")))
        Console().print(table if table.rows else f"{entry.kind} {entry.full_name} takes no options")


def _rows(host: PluginHost) -> Iterator[tuple[str, str, Text]]:
    for kind in host.catalog.entries:
        by_plugin: dict[str, list[Entry]] = {}
        for entry in host.catalog.all(kind):
            by_plugin.setdefault(str(entry.origin), []).append(entry)
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


def _observers(host: PluginHost) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for hook in vars(hookspecs):
        if hook.startswith("kdcore_") and hook != "kdcore_register":
            for impl in getattr(host.manager.hook, hook).get_hookimpls():
                found.setdefault(str(host.origins[impl.plugin_name]), []).append(hook)
    return found
