"""The plugin host: what is broken is named and kept apart, and only a recipe that names it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done

import kdcore
from kdcore.errors import PluginError, RecipeError
from kdcore.plugins import load_plugins

GOOD = """
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("acme", "nowhere_at_all:Loss", options="kdcore.options:Options", about="never imported")
"""

BROKEN = {
    "import error": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'", 1),
    "syntax error": ("def f(:", "SyntaxError: invalid syntax", 1),
    "sys.exit at import": ("import sys\nsys.exit(3)", "SystemExit: 3", 2),
    "error at import": ("\n\n1 / 0", "ZeroDivisionError: division by zero", 3),
    "bad signature": (
        "import kdcore\n@kdcore.hookimpl\ndef kdcore_register(registry, more):\n    pass",
        "Argument(s) {'more'} are declared in the hookimpl but can not be found in the hookspec",
        0,
    ),
    "unknown hook": (
        "import kdcore\n@kdcore.hookimpl\ndef kdcore_epoch_ended(run):\n    pass",
        "'kdcore_epoch_ended' is no hook. Did you mean 'kdcore_epoch_finished'?",
        0,
    ),
    "forgotten decorator": (
        "def kdcore_register(registry):\n    pass",
        "kdcore_register is not marked as a hook. Write @kdcore.hookimpl above it",
        0,
    ),
    "no hook": ("x = 1", "it implements no hook", 0),
    "wrapper": (
        "import kdcore\n@kdcore.hookimpl(wrapper=True)\ndef kdcore_run_started(run):\n    yield",
        "kdcore_run_started is a wrapper",
        0,
    ),
    "raising kdcore_register": (
        "import kdcore\n@kdcore.hookimpl\ndef kdcore_register(registry):\n    registry.nothing('x')",
        "AttributeError: 'Registrar' object has no attribute 'nothing'",
        4,
    ),
    "duplicate registration": (
        "import kdcore\n@kdcore.hookimpl\ndef kdcore_register(r):\n    r.loss('x', 'a:b')".replace("(r)", "(registry)")
        .replace("r.loss", "registry.loss") + "\n    registry.loss('x', 'a:c')",
        "loss 'x' is registered twice",
        5,
    ),
    "bad name": (
        "import kdcore\n@kdcore.hookimpl\ndef kdcore_register(registry):\n    registry.loss('My Loss', 'a:b')",
        "'My Loss' is no name for a loss. Use a-z",
        4,
    ),
    "bad target": (
        "import kdcore\n@kdcore.hookimpl\ndef kdcore_register(registry):\n    registry.loss('x', 'a.b')",
        "'a.b' says nothing to import for loss 'x'. Write \"package.module:Name\"",
        4,
    ),
    "newer hooks": (
        "import kdcore\nKDCORE_HOOKS = 99\n@kdcore.hookimpl\ndef kdcore_run_started(run):\n    pass",
        "it needs kdcore hooks 99, this is 1. Upgrade kdcore",
        0,
    ),
    "odd hooks version": ("KDCORE_HOOKS = '1'", "KDCORE_HOOKS is '1'. Write KDCORE_HOOKS = 1", 0),
}  # fmt: skip


# ---------------------------------------------------------------- broken plugins


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plugin_is_named_with_distribution_version_and_place(kind: str, install: Callable[..., Path]) -> None:
    source, says, line = BROKEN[kind]
    site = install("acme", source, version="1.2.3")
    reason = load_plugins().broken["acme"]
    assert reason.startswith("acme (acme-dist 1.2.3): ")
    assert says in reason
    place = str(site / "acme_module.py")
    assert reason.endswith(f"{place} line {line}" if line else place)
    assert "\n" not in reason


@pytest.mark.parametrize("kind", BROKEN)
def test_only_a_recipe_that_names_a_broken_plugin_fails(kind: str, install: Callable[..., Path]) -> None:
    install("acme", BROKEN[kind][0])
    catalog = load_plugins().catalog
    assert catalog.find("loss", "kd").full_name == "core/kd"
    with pytest.raises(
        PluginError, match=r"objective\[0\]\.loss: 'acme/x' needs a broken plugin: acme \(acme-dist 1\.0\)"
    ):
        catalog.find("loss", "acme/x", "objective[0].loss")


def test_registrations_of_a_broken_plugin_are_all_dropped(install: Callable[..., Path]) -> None:
    install(
        "acme",
        GOOD
        + "\n    registry.loss('more', 'a:b')\n    1 / 0\n@kdcore.hookimpl\ndef kdcore_run_started(run):\n    1 / 0",
    )
    host = load_plugins(strict=True)
    assert "acme" in host.broken
    assert "acme" not in [entry.name for entry in host.catalog.all("loss")]
    host.emit("kdcore_run_started", run={})  # its observer is gone too


def test_unknown_name_mentions_broken_plugins(install: Callable[..., Path]) -> None:
    install("acme", "1 / 0")
    catalog = load_plugins().catalog
    with pytest.raises(PluginError, match=r"unknown loss 'shiny'\. Known: .* A broken plugin may offer it: acme \("):
        catalog.find("loss", "shiny")
    with pytest.raises(RecipeError, match=r"Did you mean 'dkd'\? A broken plugin may offer it: acme \("):
        catalog.find("loss", "dkdd")  # the likelier mistake is the recipe's


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("[kdcore]\nacme = acme_module:kdcore_register\n", "'acme_module:kdcore_register' names the function"),
        ("[kdcore]\nacme = acme_module:nothing\n", "AttributeError: module 'acme_module' has no attribute 'nothing'"),
        ("[kdcore]\nacme = other_module\n", "ModuleNotFoundError: No module named 'other_module'"),
        ("[kdcore]\nacme = \n", "acme (acme-dist 1.0): "),
    ],
)
def test_entry_point_of_the_wrong_type_is_named(entry: str, says: str, install: Callable[..., Path]) -> None:
    install("acme", GOOD, entry=entry)
    assert says in load_plugins().broken["acme"]


def test_malformed_entry_points_break_their_distribution_alone(install: Callable[..., Path]) -> None:
    install("acme", GOOD, entry="[kdcore]\nacme\n")
    install("beta", GOOD.replace('"acme"', '"beta"'))
    host = load_plugins()
    assert "its entry_points.txt cannot be read" in host.broken["acme-dist"]
    assert host.catalog.find("loss", "beta").origin.distribution == "beta-dist"
    assert "vision" in host.origins


def test_entry_point_of_two_distributions_loads_neither(install: Callable[..., Path]) -> None:
    install("acme", GOOD)
    install("copy", entry="[kdcore]\nacme = acme_module\n", version="2.0")
    host = load_plugins()
    assert host.broken["acme"] == "acme: offered by acme-dist 1.0 and copy-dist 2.0. Uninstall one, or -p no:acme"
    assert "acme" not in host.origins


def test_plugin_cannot_take_the_name_of_the_core(install: Callable[..., Path]) -> None:
    install("evil", entry="[kdcore]\ncore = evil_module\n", source=GOOD)
    host = load_plugins()
    assert "its name is taken by core" in host.broken["core (evil-dist 1.0)"]
    assert host.catalog.find("loss", "core/kd").origin.plugin == "core"  # full names of stored plans still work


def test_prints_at_import_go_to_stderr(install: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", "print('hello')\n" + GOOD)
    assert "acme" in load_plugins().origins
    assert capsys.readouterr() == ("", "hello\n")


def test_broken_plugins_are_listed_and_nothing_else_is_lost(
    install: Callable[..., Path], cli: Callable[..., Done]
) -> None:
    site = install("acme", "1 / 0")
    install("beta", GOOD.replace("never imported", "with [brackets] and [/b]"))
    done = cli("plugins")
    assert done.code == 0
    assert (
        f"BROKEN  acme (acme-dist 1.0): ZeroDivisionError: division by zero, {site}/acme_module.py line 1" in done.out
    )
    assert "with [brackets] and [/b]" in done.out
    assert "vision" in done.out


# ---------------------------------------------------------------- names


def test_two_plugins_with_one_name_fail_only_where_it_is_ambiguous(install: Callable[..., Path]) -> None:
    install("acme", GOOD)
    install("beta", GOOD)
    host = load_plugins()
    assert not host.broken
    assert host.catalog.find("loss", "beta/acme").origin.plugin == "beta"
    assert host.catalog.find("loss", "kd").origin.plugin == "core"
    with pytest.raises(RecipeError, match=r"Write 'acme/acme' or 'beta/acme'\."):
        host.catalog.find("loss", "acme")


def test_plugins_load_in_the_order_of_their_names(install: Callable[..., Path]) -> None:
    for name in ("zeta", "acme", "mid"):
        install(name, GOOD)
    names = list(load_plugins().origins)
    assert names[0] == "core"
    assert names[1:] == sorted(names[1:])


def test_blocked_plugin_is_not_imported(install: Callable[..., Path]) -> None:
    install("acme", "1 / 0")
    host = load_plugins(block=["acme"])
    assert not host.broken
    assert host.left_out == {"acme"}
    with pytest.raises(RecipeError, match=r"Left out by -p: acme\."):
        host.catalog.find("loss", "acme")


# ---------------------------------------------------------------- require


@pytest.mark.parametrize("wanted", ["acme", "acme>=1.0", "acme-dist", "Acme_Dist==1.0", "acme~=1.0"])
def test_required_plugin_is_found_by_plugin_or_distribution(wanted: str, install: Callable[..., Path]) -> None:
    install("acme", GOOD)
    load_plugins().require([wanted])


def test_missing_requirement_says_what_to_do(install: Callable[..., Path]) -> None:
    install("acme", GOOD)
    install("worse", "1 / 0")
    host = load_plugins()
    with pytest.raises(PluginError, match=r"plugins\.require\[1\]: 'acme>=2' is required, acme \(acme-dist 1\.0\) is"):
        host.require(["vision", "acme>=2"])
    with pytest.raises(PluginError, match=r"'acmee' is not installed\. Install it, .* Did you mean 'acme'\?"):
        host.require(["acmee"])
    with pytest.raises(PluginError, match=r"a broken plugin: worse \(worse-dist 1\.0\): ZeroDivisionError"):
        host.require(["worse"])
    with pytest.raises(RecipeError, match=r"'>=1' is no requirement\. Write \"name\""):
        host.require([">=1"])


# ---------------------------------------------------------------- single files


def test_plugin_file_is_loaded_under_its_stem(plugin_file: Callable[..., Path]) -> None:
    file = plugin_file(
        "my_single_file", GOOD + "\n    registry.loss('own', 'my_single_file:Own')\nclass Own(kdcore.Options): pass"
    )
    host = load_plugins(files=[file, str(file)])  # twice is once
    entry = host.catalog.find("loss", "my_single_file/own")
    assert entry.origin.files == (file,)
    assert entry.load().__name__ == "Own"
    assert not host.broken


@pytest.mark.parametrize("stem", ["json", "torch", "antigravity", "kdcore"])
def test_plugin_file_never_replaces_a_module(stem: str, plugin_file: Callable[..., Path]) -> None:
    before = sys.modules.get(stem)
    file = plugin_file(stem, GOOD)
    assert f"a module {stem!r} exists already. Rename the file" in load_plugins(files=[file]).broken[stem]
    assert sys.modules.get(stem) is before


def test_plugin_file_with_the_name_of_a_plugin_leaves_that_one_alone(plugin_file: Callable[..., Path]) -> None:
    file = plugin_file("dskd", GOOD)
    host = load_plugins(files=[file])
    assert "its name is taken by dskd (kdcore" in host.broken[f"dskd {file}"]
    assert host.catalog.find("controller", "dskd/dskd").origin.distribution == "kdcore"
    host.require(["dskd"])


def test_broken_plugin_file_leaves_no_module_behind(plugin_file: Callable[..., Path]) -> None:
    file = plugin_file("my_broken_file", "x = 1\n1 / 0")
    reason = load_plugins(files=[file]).broken["my_broken_file"]
    assert reason == f"my_broken_file: ZeroDivisionError: division by zero, {file} line 2"
    assert "my_broken_file" not in sys.modules


# ---------------------------------------------------------------- identity of code


def test_code_is_the_whole_package_of_the_entry_point(install: Callable[..., Path]) -> None:
    site = install("acme", entry="[kdcore]\nacme = acme_pkg.hooks\n")
    package = site / "acme_pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "hooks.py").write_text(GOOD)
    (package / "losses.py").write_text("x = 1")
    before = load_plugins().origins["acme"].code
    (package / "losses.py").write_text("x = 2")
    assert load_plugins().origins["acme"].code != before


def test_code_is_also_the_module_that_a_target_names(install: Callable[..., Path]) -> None:
    site = install("acme", GOOD.replace("nowhere_at_all:Loss", "acme_impl:Loss"))
    (site / "acme_impl.py").write_text("class Loss: x = 1")
    first = load_plugins().origins["acme"]
    assert [path.name for path in first.files] == ["acme_impl.py", "acme_module.py"]
    assert "acme_impl" not in sys.modules
    (site / "acme_impl.py").write_text("class Loss: x = 2")
    assert load_plugins().origins["acme"].code != first.code


def test_code_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    codes = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        file = folder / "my_moved_file.py"
        file.write_text(GOOD)
        codes.append(load_plugins(files=[file]).origins["my_moved_file"].code)
        del sys.modules["my_moved_file"]
    assert codes[0] == codes[1]


# ---------------------------------------------------------------- observers

NOSY = """
import kdcore
calls = []

@kdcore.hookimpl
def kdcore_epoch_finished(metrics, epoch):
    calls.append(epoch)
    metrics["student"]["accuracy"] = 1.0
    raise ValueError("no disk")
"""


def test_observer_that_raises_is_muted_and_said_once(
    install: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    install("nosy", NOSY)
    host = load_plugins()
    metrics = {"student": {"accuracy": 0.5}}
    for epoch in (1, 2, 3):
        host.emit("kdcore_epoch_finished", run={}, stage={}, epoch=epoch, metrics=metrics)
    assert sys.modules["nosy_module"].calls == [1]
    assert metrics == {"student": {"accuracy": 0.5}}  # observers see copies
    err = capsys.readouterr().err
    assert err.count("muted for this run") == 1
    assert "plugin nosy (nosy-dist 1.0): kdcore_epoch_finished raised ValueError: no disk, " in err
    assert "nosy_module.py line 9" in err


def test_observer_that_exits_does_not_end_the_run(install: Callable[..., Path]) -> None:
    install("nosy", NOSY.replace('raise ValueError("no disk")', "raise SystemExit(0)"))
    host = load_plugins()
    host.emit("kdcore_epoch_finished", run={}, stage={}, epoch=1, metrics={"student": {}})
    assert "nosy" in host.muted


def test_strict_plugins_makes_an_observer_fatal(install: Callable[..., Path]) -> None:
    install("nosy", NOSY)
    host = load_plugins(strict=True)
    with pytest.raises(PluginError, match=r"plugin nosy \(nosy-dist 1\.0\): kdcore_epoch_finished raised ValueError"):
        host.emit("kdcore_epoch_finished", run={}, stage={}, epoch=1, metrics={"student": {}})


def test_muted_observer_is_listed_in_the_result(
    install: Callable[..., Path], tiny: Callable[..., Path], cli: Callable[..., Done], tmp_path: Path
) -> None:
    install("nosy", NOSY)
    done = cli("run", tiny())
    assert done.code == 0
    assert done.err.count("it is muted for this run") == 1
    result = json.loads(next(tmp_path.glob("runs/tiny-*/result.json")).read_text())
    assert "kdcore_epoch_finished raised ValueError: no disk" in result["degraded"]["nosy"]
    assert cli("run", tiny("strategy = 'distill'"), "--set", "seed=1", "--strict-plugins").code == 3


# ---------------------------------------------------------------- errors inside plugins

WRONG = """
import kdcore
from kdcore import Term, Outcome
import torch

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("bad", Loss, options=kdcore.Options)
    registry.controller("bad", Controller, options=kdcore.Options)
    registry.strategy("bad", Strategy, options=kdcore.Options)
    registry.model("bad", model, options=kdcore.Options)

class Loss(torch.nn.Module):
    needs = frozenset()
    @classmethod
    def build(cls, shapes, options):
        return cls()
    def forward(self, own, other, batch):
        return [][0]  # loss

class Controller:
    needs = frozenset()
    def __init__(self, options):
        pass
    def decide(self, view):
        return [][0]  # controller
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass

class Strategy:
    def plan(self, run, options):
        yield run.label_only("teacher", run.teacher)
        return [][0]  # strategy

def model(options, data):
    return [][0]  # model
"""
NAMED = {
    "loss": '[[objective]]\nloss = "bad"',
    "controller": '[[controller]]\nname = "bad"',
    "strategy": '[strategy]\nname = "bad"',
    "model": "",
}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kind", NAMED)
def test_error_in_plugin_code_names_plugin_and_line_and_exits_3(
    kind: str, jobs: int, tiny: Callable[..., Path], cli: Callable[..., Done], plugin_file: Callable[..., Path]
) -> None:
    file = plugin_file("wrong_code", WRONG)
    line = next(number for number, text in enumerate(WRONG.splitlines(), 1) if text.endswith(f"# {kind}"))
    bad_model = ("--set", 'student={ model = "bad" }') if kind == "model" else ()
    done = cli("run", tiny(NAMED[kind]), "--plugin-file", file, "--jobs", jobs, *bad_model)
    assert done.code == 3, done.err
    assert f"in plugin wrong_code, {file} line {line}" in done.err
    assert "kdcore: a plugin failed: " in done.err
    assert "IndexError: list index out of range" in done.err
    assert "bug in kdcore" not in done.err


def test_plan_blames_a_strategy_too(
    tiny: Callable[..., Path], cli: Callable[..., Done], plugin_file: Callable[..., Path]
) -> None:
    file = plugin_file("wrong_plan", WRONG)
    done = cli("plan", tiny(NAMED["strategy"]), "--plugin-file", file)
    assert done.code == 3
    assert f"in plugin wrong_plan, {file} line" in done.err


def test_plugin_that_exits_is_no_success(
    tiny: Callable[..., Path], cli: Callable[..., Done], plugin_file: Callable[..., Path]
) -> None:
    file = plugin_file("quitter", WRONG.replace("return [][0]  # strategy", "raise SystemExit(0)"))
    done = cli("run", tiny(NAMED["strategy"]), "--plugin-file", file)
    assert done.code == 3
    assert f"a plugin: it called sys.exit(0), {file} line" in done.err


def test_target_that_cannot_be_imported_is_blamed(
    install: Callable[..., Path], tiny: Callable[..., Path], cli: Callable[..., Done]
) -> None:
    install("acme", GOOD.replace(', options="kdcore.options:Options"', ""))
    done = cli("run", tiny('[[objective]]\nloss = "acme"'))
    assert done.code == 3
    assert "No module named 'nowhere_at_all'" in done.err
    assert "in plugin acme (acme-dist 1.0), loading loss 'acme/acme'" in done.err


def test_validator_that_raises_blames_its_plugin(install: Callable[..., Path]) -> None:
    install(
        "acme",
        """
        import kdcore, pydantic

        class Odd(kdcore.Options):
            x: int = 0

            @pydantic.field_validator("x")
            @classmethod
            def check(cls, value):
                return {}[value]

        @kdcore.hookimpl
        def kdcore_register(registry):
            registry.loss("odd", "a:b", options=Odd)
        """,
    )
    entry = load_plugins().catalog.find("loss", "odd")
    with pytest.raises(KeyError) as error:
        entry.check({"x": 1}, "objective[0]")
    assert error.value.__notes__ == ["in plugin acme (acme-dist 1.0), checking the options of loss 'acme/odd'"]


# ---------------------------------------------------------------- the exported names


def test_type_checkers_see_every_exported_name() -> None:
    import ast

    tree = ast.parse(Path(kdcore.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {(node.module, alias.name) for node in imports for alias in node.names}
    assert seen == {(home, name) for name, home in kdcore._HOME.items()}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)


def test_every_exported_name_exists() -> None:
    for name in kdcore.__all__:
        assert getattr(kdcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Stag'"):
        _ = kdcore.Stag
