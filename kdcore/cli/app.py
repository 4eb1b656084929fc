"""The commands. Torch is imported only by those that train or build models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import EXIT_CODES, RecipeError
from ..plugins import PluginHost, load_plugins

RUNS = Path("runs")
EXITS = "Exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items()) + "."

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe, e.g. examples/digits.toml")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. train.epochs=5")]
Files = Annotated[list[str] | None, typer.Option("--plugin-file", metavar="FILE", help="load a .py file as a plugin")]
Block = Annotated[list[str] | None, typer.Option("-p", metavar="no:NAME", help="leave a plugin out")]
Root = Annotated[Path, typer.Option("--root", metavar="DIR", help="where runs and the store live")]
StoreDir = Annotated[Path | None, typer.Option("--store", metavar="DIR", help="the store (default: ROOT/store)")]
Jobs = Annotated[int | None, typer.Option("--jobs", metavar="N", min=1, help="stages at once")]


def build(arguments: list[str]) -> typer.Typer:
    """The application; plugins' commands are added unless a built-in one was asked for."""
    app = typer.Typer(
        help=f"Knowledge distillation as plugins on one runner.\n\n{EXITS}",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for command in (run, resume, plan, plugins, report, doctor):
        app.command()(command)
    app.add_typer(_store_app(), name="store", help="List, clean, pack and unpack stored results.")
    built_in = {"run", "resume", "plan", "plugins", "report", "doctor", "store"}
    if not built_in & set(arguments[:1]):
        for entry in load_plugins().catalog.all("command"):
            app.command(entry.name, help=entry.about)(entry.load())
    return app


def run(
    recipe: RecipeFile,
    sets: Sets = None,
    jobs: Jobs = None,
    root: Root = RUNS,
    store: StoreDir = None,
    plugin_file: Files = None,
    block: Block = None,
    strict: Annotated[bool, typer.Option("--strict", help="a preflight warning ends the run")] = False,
    strict_plugins: Annotated[bool, typer.Option("--strict-plugins", help="a failing observer ends the run")] = False,
    allow_plugin_change: Annotated[bool, typer.Option("--allow-plugin-change")] = False,
) -> None:
    """Run a recipe; run it again to go on after a kill, or to reuse what is stored."""
    from .drive import drive

    host = load_plugins(_blocked(block), plugin_file or (), strict_plugins)
    drive(recipe, sets or [], host, jobs, root, store, plugin_file or [], _blocked(block), strict, allow_plugin_change)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    jobs: Jobs = None,
    allow_plugin_change: Annotated[bool, typer.Option("--allow-plugin-change")] = False,
    block: Block = None,
    strict: Annotated[bool, typer.Option("--strict")] = False,
) -> None:
    """Go on with a run from its folder."""
    from .drive import drive

    saved = _read_json(folder / "run.json", "Give the folder of a run, e.g. runs/digits-1a2b3c4d.")
    host = load_plugins(_blocked(block), saved["plugin_files"])
    drive(
        saved["recipe"], [], host, jobs, folder.parent, Path(saved["store"]), saved["plugin_files"],
        _blocked(block), strict, allow_plugin_change, folder,
    )  # fmt: skip


def plan(
    recipe: RecipeFile,
    sets: Sets = None,
    root: Root = RUNS,
    store: StoreDir = None,
    plugin_file: Files = None,
    block: Block = None,
) -> None:
    """Print the stages of a recipe with their cost; run nothing."""
    from .drive import show_plan

    host = load_plugins(_blocked(block), plugin_file or ())
    show_plan(recipe, sets or [], host, root, store, plugin_file or [])


def plugins(plugin_file: Files = None, block: Block = None) -> None:
    """List what every plugin offers, and the broken ones with the reason."""
    from rich.console import Console
    from rich.table import Table

    host = load_plugins(_blocked(block), plugin_file or ())
    table = Table("kind", "name", "plugin", "about")
    for kind, entries in host.catalog.entries.items():
        for entry in [e for _, group in sorted(entries.items()) for e in group]:
            table.add_row(kind, entry.name, str(entry.origin), entry.about)
    console = Console()
    console.print(table)
    for name, reason in host.broken.items():
        console.print(f"BROKEN {name}: {reason}", style="bold red", markup=False)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")],
) -> None:
    """Write report.html of a finished run again."""
    from ..report import write

    result = _read_json(folder / "result.json", "The run is not finished: kdcore resume it first.")
    write(result, folder / "report.html")
    typer.echo(str(folder / "report.html"))


def doctor() -> None:
    """Show versions, devices, loss back ends and plugins, and what is wrong with them."""
    from .doctor import examine

    examine(load_plugins())


def _store_app() -> typer.Typer:
    app = typer.Typer(no_args_is_help=True)

    @app.command("ls")
    def ls(root: Root = RUNS, store: StoreDir = None) -> None:
        """List stored results."""
        from .drive import list_store

        list_store(store or root / "store")

    @app.command("gc")
    def gc(root: Root = RUNS, store: StoreDir = None, dry_run: Annotated[bool, typer.Option("--dry-run")] = False) -> None:
        """Remove results that no run under ROOT names, stale checkpoints and damaged folders."""
        from .drive import collect

        collect(root, store or root / "store", dry_run)

    @app.command("pack")
    def pack(file: Path, root: Root = RUNS, store: StoreDir = None) -> None:
        """Write all results to one tar file."""
        from ..store import Store

        source = Store(store or root / "store")
        source.pack(file, source.keys())
        typer.echo(f"{len(source.keys())} results in {file}")

    @app.command("unpack")
    def unpack(file: Path, root: Root = RUNS, store: StoreDir = None) -> None:
        """Add the results of a tar file; each is verified."""
        from ..store import Store

        typer.echo(f"{len(Store(store or root / 'store').unpack(file))} new results")

    return app


def _blocked(block: list[str] | None) -> list[str]:
    for text in block or []:
        if not text.startswith("no:"):
            raise RecipeError(f"{text!r}", where="-p", fix="Write -p no:NAME.")
    return [text.removeprefix("no:") for text in block or []]


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{type(error).__name__}: {error}", where=str(path), fix=fix) from None


__all__ = ["PluginHost", "build"]
