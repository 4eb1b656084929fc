"""The plugin host: what is broken is named and kept apart, and only a recipe that names it fails."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Done

from kdcore.alarm import limited
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
        "it needs kdcore hooks 99, this is 2. Upgrade kdcore",
        0,
    ),
    "hang at import": (
        "import time\ntry:\n    time.sleep(99)\nexcept Exception:\n    pass",
        "HangError: not loaded after 0.5 s; KDCORE_PLUGIN_SECONDS sets another limit",
        3,
    ),
    "hang in kdcore_register": (
        "import kdcore\n@kdcore.hookimpl\ndef kdcore_register(registry):\n    while True: pass",
        "HangError: not loaded after 0.5 s",
        4,
    ),
    "odd hooks version": ("KDCORE_HOOKS = '1'", "KDCORE_HOOKS is '1'. Write KDCORE_HOOKS = 2", 0),
}  # fmt: skip


# ---------------------------------------------------------------- broken plugins


@pytest.fixture(autouse=True)
def impatient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "hang" in request.node.name:
        monkeypatch.setenv("KDCORE_PLUGIN_SECONDS", "0.5")


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
    with pytest.raises(
        PluginError, match=r"unknown strategy 'shiny'\. Known: .* A broken plugin may offer it: acme \("
    ):
        catalog.find("strategy", "shiny")
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


def test_an_object_that_answers_to_any_name_breaks_no_plugin(install: Callable[..., Path]) -> None:
    source = """
    import kdcore

    class Lookup:
        def __getattr__(self, name):
            return {}[name]

    settings = Lookup()

    @kdcore.hookimpl
    def kdcore_register(registry):
        registry.model("m", "m:m")
    """
    install("lookup", source)
    host = load_plugins()
    assert host.broken == {}
    assert host.catalog.find("model", "m").origin.plugin == "lookup"


def test_prints_at_import_go_to_stderr(install: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", "print('hello')\n" + GOOD)
    assert "acme" in load_plugins().origins
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_plugin_that_hangs_is_left_behind_by_drivers_and_workers_and_other_recipes_pass(
    jobs: int, install: Callable[..., Path], cli: Callable[..., Done], tiny: Callable[..., Path]
) -> None:
    install("acme", "import time; time.sleep(999)")
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    assert cli("run", tiny(), "--jobs", jobs).code == 0
    done = cli("run", tiny(), "--set", "student.model=acme/net")
    assert done.code == 3
    assert "needs a broken plugin: acme (acme-dist 1.0): HangError: not loaded after 0.5 s" in done.err
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[1]) == (before[0], before[1][1])


def test_a_timer_of_the_caller_rings_though_a_plugin_was_loaded_meanwhile(install: Callable[..., Path]) -> None:
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        install("acme", "import time; time.sleep(0.4)\n" + GOOD)
        assert "acme" in load_plugins().origins
        time.sleep(0.05)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rung == [1]


def test_an_alarm_that_rings_while_the_limit_ends_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    real, before = signal.setitimer, signal.getsignal(signal.SIGALRM)

    def ringing(which: int, seconds: float, interval: float = 0.0) -> tuple[float, float]:
        if not seconds:
            signal.raise_signal(signal.SIGALRM)
        return real(which, seconds, interval)

    monkeypatch.setattr(signal, "setitimer", ringing)
    with limited(60):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_there_is_no_limit_and_no_error(install: Callable[..., Path]) -> None:
    install("acme", GOOD)
    with ThreadPoolExecutor() as pool:
        assert "acme" in pool.submit(load_plugins).result().origins


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_an_odd_limit_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCORE_PLUGIN_SECONDS", text)
    with pytest.raises(RecipeError, match=f"KDCORE_PLUGIN_SECONDS: '{text}' is no number of seconds above 0"):
        load_plugins()


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
