"""The commands. Torch is imported only by those that train or build models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import EXIT_CODES, PluginError, RecipeError, StorageError, suggest
from ..plugins import CORE, PluginHost, load_plugins
from ..reading import read_table
from .extra import add_commands

RUNS = Path("runs")
EXITS = "\b\nExit codes:\n" + "\n".join(f"{code:>4}  {text}" for code, text in EXIT_CODES.items())

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe, e.g. examples/digits.toml")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override, e.g. train.epochs=5")]
Files = Annotated[list[str] | None, typer.Option("--plugin-file", metavar="FILE", help="load a .py file as a plugin")]
Block = Annotated[list[str] | None, typer.Option("-p", metavar="no:NAME", help="leave a plugin out")]
Root = Annotated[Path, typer.Option("--root", metavar="DIR", help="where runs and the store live")]
StoreDir = Annotated[Path | None, typer.Option("--store", metavar="DIR", help="the store (default: ROOT/store)")]
Strict = Annotated[bool, typer.Option("--strict", help="a preflight warning ends the run")]
StrictPlugins = Annotated[bool, typer.Option("--strict-plugins", help="a failing observer ends the run")]
AllowChange = Annotated[bool, typer.Option("--allow-plugin-change", help="go on although other plugins are loaded")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")]
Jobs = Annotated[int | None, typer.Option("--jobs", metavar="N", min=1, help="stages at once")]


def build(arguments: list[str]) -> typer.Typer:
    """The application; plugins' commands are added unless a built-in one was asked for."""
    app = typer.Typer(
        help=f"Knowledge distillation as plugins on one runner.\n\n{EXITS}",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_top)
    commands = (run, resume, plan, plugins, report, doctor)
    for command in commands:
        app.command()(command)
    app.add_typer(_store_app(), name="store", help="List, clean, pack and unpack stored results.")
    built_in = {"store", *(command.__name__ for command in commands)}
    if not built_in & set(arguments[:1]):
        add_commands(app, load_plugins(), built_in, arguments)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kdcore {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="show it", is_eager=True, callback=_show_version)]


def _top(version: Version = False) -> None:
    """Its help is the application's."""


def run(
    recipe: RecipeFile,
    sets: Sets = None,
    jobs: Jobs = None,
    root: Root = RUNS,
    store: StoreDir = None,
    plugin_file: Files = None,
    block: Block = None,
    strict: Strict = False,
    strict_plugins: StrictPlugins = False,
    allow_plugin_change: AllowChange = False,
) -> None:
    """Run a recipe; run it again to go on after a kill, or to reuse what is stored."""
    from .drive import drive

    files, blocked = plugin_file or [], _blocked(block)
    host = _host(blocked, files, strict_plugins)
    with host.blaming():
        # absolute, so that `resume` finds it from any folder
        place = (store or root / "store").resolve()
        drive(recipe, sets or [], host, jobs, root, place, files, blocked, strict, allow_plugin_change)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    jobs: Jobs = None,
    allow_plugin_change: AllowChange = False,
    block: Block = None,
    strict: Strict = False,
    strict_plugins: StrictPlugins = False,
) -> None:
    """Go on with a run from its folder."""
    from .drive import Saved, drive

    data = _read_json(folder / "run.json", "Give the folder of a run, e.g. runs/digits-1a2b3c4d.")
    try:
        saved = Saved.model_validate(data)
    except ValueError:
        where = str(folder / "run.json")
        raise RecipeError("no run of kdcore", where=where, fix="Run the recipe again.") from None
    files, blocked = saved.plugin_files, [*saved.blocked, *_blocked(block)]
    folder = folder.resolve()
    if saved.cwd.is_dir():
        os.chdir(saved.cwd)  # what the recipe's paths are relative to
    host = _host(blocked, files, strict_plugins)
    with host.blaming():
        drive(
            saved.recipe, [], host, jobs or saved.jobs, folder.parent, saved.store, files, blocked,
            strict, allow_plugin_change, folder, saved.threads,
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

    host = _host(_blocked(block), plugin_file or [])
    with host.blaming():
        show_plan(recipe, sets or [], host, root, store)


def plugins(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="show the options of this name")] = None,
    plugin_file: Files = None,
    block: Block = None,
) -> None:
    """List what every plugin offers, and the broken ones with the reason; or the options of one name."""
    from .listing import show, show_options

    host = load_plugins(_blocked(block), plugin_file or ())
    if name is None:
        show(host)
    else:
        show_options(host, name)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")],
) -> None:
    """Write report.html of a finished run again."""
    from ..report import write

    result = _read_json(folder / "result.json", "The run is not finished: kdcore resume it first.")
    try:
        write(result, folder / "report.html")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        fix = "kdcore resume the run: it writes it again."
        raise StorageError(f"no result of kdcore: {error!r}", where=str(folder / "result.json"), fix=fix) from error
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
    def gc(root: Root = RUNS, store: StoreDir = None, dry_run: DryRun = False) -> None:
        """Remove results that no run under ROOT names, stale checkpoints and damaged folders."""
        from .drive import collect

        collect(root, store or root / "store", dry_run)

    @app.command("pack")
    def pack(file: Path, root: Root = RUNS, store: StoreDir = None) -> None:
        """Write all results to one tar file."""
        from ..store import Store

        source = Store(store or root / "store")
        source.pack(file, source.stored())
        typer.echo(f"{len(source.stored())} results in {file}")

    @app.command("unpack")
    def unpack(file: Path, root: Root = RUNS, store: StoreDir = None) -> None:
        """Add the results of a tar file; each is verified."""
        from ..store import Store

        typer.echo(f"{len(Store(store or root / 'store').unpack(file))} new results")

    return app


def _host(blocked: list[str], files: list[str], strict: bool = False) -> PluginHost:
    """The plugins of a run. What the command line names must be there; what is merely installed may be broken."""
    host = load_plugins(blocked, files, strict)
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
    return host


def _blocked(block: list[str] | None) -> list[str]:
    for text in block or []:
        if not text.startswith("no:") or text == "no:":
            fix = "Write -p no:NAME; --plugin-file loads a file."
            raise RecipeError(f"{text!r} leaves nothing out", where="-p", fix=fix)
    return [text.removeprefix("no:") for text in block or []]


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        return read_table(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError("no such file", where=str(path), fix=fix) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read: {error}", where=str(path), fix=fix) from None


__all__ = ["PluginHost", "build"]
