"""The commands. Torch is imported only by those that train or build models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import EXIT_CODES, RecipeError
from ..origin import OWN
from ..plugins import PluginHost, load_plugins
from ..reading import read_table
from .extra import add_commands
from .host import load_host

if TYPE_CHECKING:
    from .drive import Saved

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
    commands = (run, search, resume, compare, plan, plugins, new_plugin, check_plugin, report, export, convert, doctor)
    for command in commands:
        app.command()(command)
    app.add_typer(_store_app(), name="store", help="List, clean, pack and unpack stored results.")
    built_in = {"store", *(command.__name__.replace("_", "-") for command in commands)}
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
    host = load_host(blocked, files, strict_plugins)
    with host.blaming():
        # absolute, so that `resume` finds it from any folder
        place = (store or root / "store").resolve()
        drive(recipe, sets or [], host, jobs, root, place, files, blocked, strict, allow_plugin_change)


def search(
    recipe: RecipeFile,
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="NAME", help="short for --set strategy.mode=NAME")
    ] = None,
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
    """Run a recipe whose strategy is search, and show the tree of chains while it grows."""
    from .drive import drive
    from .treeconsole import TreeConsole, check_searches

    files, blocked, sets = plugin_file or [], _blocked(block), sets or []
    host = load_host(blocked, files, strict_plugins)
    check_searches(recipe, sets)
    sets += [f"strategy.mode={mode}"] if mode else []
    with host.blaming():
        place = (store or root / "store").resolve()
        drive(
            recipe, sets, host, jobs, root, place, files, blocked, strict, allow_plugin_change, show=TreeConsole,
        )  # fmt: skip


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    jobs: Jobs = None,
    allow_plugin_change: AllowChange = False,
    block: Block = None,
    strict: Strict = False,
    strict_plugins: StrictPlugins = False,
) -> None:
    """Go on with a run from its folder."""
    from ..ranks import ranks
    from ..recipe import load
    from .console import RunConsole
    from .drive import drive
    from .treeconsole import TreeConsole, is_search

    saved = _saved(folder)
    if any(OWN in plugin for plugin in saved.plugins):
        fix = "Make the same call of kdcore.distill again: it goes on."
        raise RecipeError("its modules and data were handed over in Python", where=str(folder), fix=fix)
    if saved.world_size != (now := ranks().size):
        command = f"torchrun --nproc-per-node {saved.world_size} -m kdcore" if saved.world_size > 1 else "kdcore"
        what = f"it was trained by {saved.world_size} processes, not {now}, and other parts give other bits"
        raise RecipeError(what, where=str(folder), fix=f"Run `{command} resume {folder}`.")
    files, blocked = saved.plugin_files, [*saved.blocked, *_blocked(block)]
    folder = folder.resolve()
    if saved.cwd.is_dir():
        os.chdir(saved.cwd)  # what the recipe's paths are relative to
    host = load_host(blocked, files, strict_plugins)
    with host.blaming():
        show = TreeConsole if is_search(load(saved.recipe).strategy.name) else RunConsole
        drive(
            saved.recipe, [], host, jobs or saved.jobs, folder.parent, saved.store, files, blocked,
            strict, allow_plugin_change, folder, saved.threads, show,
        )  # fmt: skip


def plan(
    recipe: RecipeFile,
    sets: Sets = None,
    root: Root = RUNS,
    store: StoreDir = None,
    plugin_file: Files = None,
    block: Block = None,
) -> None:
    """Print the stages of a recipe with their cost, and try it on a few samples; train nothing."""
    from .drive import show_plan

    host = load_host(_blocked(block), plugin_file or [])
    with host.blaming():
        show_plan(recipe, sets or [], host, root, store)


def plugins(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="show the options of this name, or what this plugin offers")
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help="list one kind alone, e.g. loss")] = None,
    plugin_file: Files = None,
    block: Block = None,
) -> None:
    """List what every plugin offers, and the broken ones with the reason; or the options of one name."""
    from .listing import show, show_name

    host = load_plugins(_blocked(block), plugin_file or ())
    if name is None:
        show(host, kind)
    else:
        show_name(host, name, kind)


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the package, e.g. born-again")],
    strategy: Annotated[bool, typer.Option("--strategy", help="what to train next (the default)")] = False,
    loss: Annotated[bool, typer.Option("--loss", help="what a student minimises")] = False,
    controller: Annotated[bool, typer.Option("--controller", help="what changes while a stage trains")] = False,
    model: Annotated[bool, typer.Option("--model", help="from images to logits")] = False,
    parent: Annotated[Path, typer.Option("--dir", metavar="DIR", help="where the package's folder is made")] = Path(),
) -> None:
    """Write a small package with one plugin, its test and a recipe to try it."""
    from .author import create

    flags = {"strategy": strategy, "loss": loss, "controller": controller, "model": model}
    create(name, [kind for kind, wanted in flags.items() if wanted], parent, load_plugins())


def check_plugin(
    plugin: Annotated[str, typer.Argument(metavar="NAME|FILE", help="an installed plugin, or a .py file")],
) -> None:
    """Run kdcore's conformance checks on all that a plugin registers."""
    from .author import check

    module = load_host([], [plugin]).manager.get_plugin(Path(plugin).stem) if plugin.endswith(".py") else None
    check(module or plugin)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    watch: Annotated[bool, typer.Option("--watch", help="again and again, until the run is finished")] = False,
    seconds: Annotated[float, typer.Option("--seconds", metavar="N", min=0.1, help="between two pages")] = 5.0,
) -> None:
    """Write report.html of a run: of one that is not finished, how far it is."""
    from .watch import write_report

    write_report(folder, watch, seconds)


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of finished runs")],
    chains: Annotated[bool, typer.Option("--chains", help="compare all chains within the runs")] = False,
    mix: Annotated[bool, typer.Option("--mix-protocols", help="although data, splits or selection differ")] = False,
    target: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the same as JSON")] = None,
) -> None:
    """Compare runs of two recipes or more, paired by seed, with 95 % intervals."""
    from .compare import compare_runs

    compare_runs(folders, chains, mix, target)


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run's folder, or a .safetensors file")],
    name: Annotated[str, typer.Option("--format", metavar="NAME", help="an exporter")] = "torch-export",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="default: beside RUN's or FILE's")] = None,
    member: Annotated[str, typer.Option("--member", metavar="NAME", help="of RUN: student or teacher")] = "student",
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=2, help="images to compare on")] = 8,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="of the exporter")] = None,
    plugin_file: Files = None,
    block: Block = None,
) -> None:
    """Write a trained model for other programs, and compare what was written with the model."""
    from .exchange import export_model, member_file

    files, blocked, file, beside = plugin_file or [], _blocked(block), source, source
    if source.is_dir():
        saved = _saved(source)
        result = _read_json(source / "result.json", "The run is not finished: kdcore resume it first.")
        files, blocked = [*saved.plugin_files, *files], [*saved.blocked, *blocked]
        file, beside = member_file(source, member, saved.store, result), source / f"{member}.safetensors"
    host = load_host(blocked, files)
    with host.blaming():
        export_model(host, file, name, sets or [], out, beside, batch)


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="a .pth, .pt or .safetensors file")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="the .safetensors file to write")],
    key: Annotated[str, typer.Option("--key", metavar="NAME", help="where in IN the state dict is")] = "",
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="the model that it belongs to")] = "",
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an option of the model")] = None,
    shape: Annotated[str | None, typer.Option("--shape", metavar="CxHxW", help="of an image, e.g. 3x32x32")] = None,
    classes: Annotated[int | None, typer.Option("--classes", metavar="N", min=1, help="number of classes")] = None,
    mean: Annotated[str | None, typer.Option("--mean", metavar="X[,X,X]", help="of the normalisation")] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="X[,X,X]", help="of the normalisation")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="stored pixels / this are normalised (255)")] = None,
    plugin_file: Files = None,
) -> None:
    """Turn a checkpoint of torch into a weights file; nothing that it holds is run."""
    from .exchange import convert_file

    host = load_host([], plugin_file or [])
    images = {"shape": shape, "classes": classes, "mean": mean, "std": std, "scale": scale}
    with host.blaming():
        convert_file(host, source, target, key, model, sets or [], images)


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
        """Remove results that no run under ROOT names, stale checkpoints, damaged folders and teachers' caches."""
        from .drive import collect

        collect(root, store or root / "store", dry_run)

    @app.command("pack")
    def pack(file: Path, root: Root = RUNS, store: StoreDir = None) -> None:
        """Write all results to one tar file."""
        from ..report.formats import counted
        from ..store import Store

        source = Store(store or root / "store")
        source.pack(file, source.stored())
        typer.echo(f"{counted(len(source.stored()), 'result')} in {file}")

    @app.command("unpack")
    def unpack(file: Path, root: Root = RUNS, store: StoreDir = None) -> None:
        """Add the results of a tar file; each is verified."""
        from ..report.formats import counted
        from ..store import Store

        typer.echo(counted(len(Store(store or root / "store").unpack(file)), "new result"))

    return app


def _blocked(block: list[str] | None) -> list[str]:
    for text in block or []:
        if not text.startswith("no:") or text == "no:":
            fix = "Write -p no:NAME; --plugin-file loads a file."
            raise RecipeError(f"{text!r} leaves nothing out", where="-p", fix=fix)
    return [text.removeprefix("no:") for text in block or []]


def _saved(folder: Path) -> Saved:
    """What run.json in the folder of a run says."""
    from .drive import Saved

    path = folder / "run.json"
    data = _read_json(path, "Give the folder of a run, e.g. runs/digits-1a2b3c4d.")
    try:
        return Saved.model_validate(data)
    except ValueError:
        raise RecipeError("no run of kdcore", where=str(path), fix="Run the recipe again.") from None


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        return read_table(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError("no such file", where=str(path), fix=fix) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read: {error}", where=str(path), fix=fix) from None


__all__ = ["PluginHost", "build"]
