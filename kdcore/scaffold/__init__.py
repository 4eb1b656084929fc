"""``kdcore new-plugin``: a complete small package with one plugin, its test and a recipe to try it."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from .. import __version__
from ..errors import RecipeError, StorageError
from ..hookspecs import HOOKS_VERSION
from ..plugins import PluginHost

KINDS = ("strategy", "loss", "controller", "model")
LONGEST_NAME = 40  # the generated lines stay below 120 columns


@dataclass(frozen=True)
class Package:
    """A plugin that is to be written, and the names that follow from its own.

    Args:
        kind: one of :data:`KINDS`.
        name: of the distribution, normalised: ``kdcore-acme`` or ``acme``.
    """

    kind: str
    name: str

    @property
    def plugin(self) -> str:
        """What recipes write: the name without ``kdcore-``."""
        return self.name.removeprefix("kdcore-")

    @property
    def module(self) -> str:
        """What Python imports."""
        return self.name.replace("-", "_")

    @property
    def cls(self) -> str:
        """The class of the example: ``BornAgainStrategy``."""
        words = self.plugin.removesuffix(self.kind).split("-")
        return "".join(word.capitalize() for word in [*words, self.kind])

    @property
    def files(self) -> Mapping[str, str]:
        """Path in the package -> template."""
        source = f"src/{self.module}"
        torch_free = {f"{source}/options.py": f"{self.kind}_options.py"} if self.needs_torch else {}
        return {
            "pyproject.toml": "pyproject.toml",
            "README.md": "README.md",
            ".gitignore": "gitignore",
            "recipe.toml": "recipe.toml",
            f"{source}/__init__.py": "init.py",
            **torch_free,
            f"{source}/{self.kind}.py": f"{self.kind}.py",
            f"tests/test_{self.module}.py": f"test_{self.kind}.py",
        }

    @property
    def needs_torch(self) -> bool:
        """Whether the example imports torch, so that its options have to lie in a file of their own."""
        return self.kind in ("loss", "model")


def check_name(name: str, kind: str, host: PluginHost) -> Package:
    """The package that ``name`` gives.

    Raises:
        RecipeError: it is no name of a Python package, or one that is taken.
    """
    from packaging.utils import InvalidName, canonicalize_name

    try:
        package = Package(kind, canonicalize_name(name, validate=True))
    except InvalidName:
        raise _refused(name, "no name of a package", "Use letters, digits and -, e.g. born-again.") from None
    if not re.match("[a-z]", package.plugin) or keyword.iskeyword(package.module):
        raise _refused(name, f"{package.module!r} is no name of a module", f"Try kdcore-my-{package.plugin}.")
    if len(package.name) > LONGEST_NAME:
        raise _refused(name, f"{len(package.name)} characters", f"Use at most {LONGEST_NAME}.")
    if taken := _taken(package, host):
        raise _refused(name, taken, "Choose another name.")
    return package


def _refused(name: str, what: str, fix: str) -> RecipeError:
    return RecipeError(what, where=f"new-plugin {name}", fix=fix)


def _taken(package: Package, host: PluginHost) -> str:
    """What has one of the names already."""
    if package.plugin in {*host.origins, *host.broken}:
        return f"a plugin {package.plugin!r} is installed"
    same = host.catalog.entries[package.kind].get(package.plugin, ())
    if same:
        return f"the {package.kind} {same[0].full_name!r} has that name"
    if any(distributions(name=package.name)):
        return f"a distribution {package.name!r} is installed"
    spec = find_spec(package.module)  # without an origin it is any folder of that name, e.g. of an earlier try
    return f"a module {package.module!r} is importable" if spec is not None and spec.origin is not None else ""


def write(package: Package, parent: Path) -> Path:
    """Writes the package into a new folder of its name; returns that folder.

    Raises:
        RecipeError: the folder is there already.
        StorageError: it cannot be written.
    """
    folder = parent / package.name
    if folder.exists():
        raise RecipeError("it exists already", where=str(folder), fix="Remove it, or choose another --dir.")
    texts = {path: _render(template, package) for path, template in package.files.items()}
    try:
        for path, text in texts.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise StorageError(what, where=str(folder), fix="Choose another --dir.") from error
    return folder


def _render(template: str, package: Package) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Python and TOML, of a name that was checked
    )
    return environment.get_template(f"{template}.jinja").render(it=package, version=__version__, hooks=HOOKS_VERSION)
