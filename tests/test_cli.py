"""The command line as a person meets it: exit codes, messages, what is imported, and a whole run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done

from kdcore import __version__, errors
from kdcore.errors import EXIT_CODES, KdError

BUILT_IN = (
    "run", "search", "resume", "compare", "plan", "plugins", "new-plugin", "check-plugin", "report", "doctor", "store",
)  # fmt: skip


# ---------------------------------------------------------------- start-up


def imported(done: Done) -> set[str]:
    """Modules in the output of ``-X importtime``."""
    return {line.rpartition("|")[2].strip() for line in done.err.splitlines() if line.startswith("import time:")}


def test_import_of_kdcore_is_lazy(shell: Callable[..., Done]) -> None:
    loaded = imported(shell("-X", "importtime", "-c", "import kdcore"))
    assert "kdcore" in loaded
    assert not loaded & {"torch", "pydantic", "pydantic_core", "pluggy", "numpy", "rich", "typer"}


@pytest.mark.parametrize(
    "command", [("--help",), ("plugins",), ("new-plugin", "acme"), ("run", "--help"), ("store", "ls")]
)
def test_light_commands_never_import_torch(command: tuple[str, ...], shell: Callable[..., Done]) -> None:
    done = shell("-X", "importtime", "-m", "kdcore", *command)
    assert done.code == 0
    assert not imported(done) & {"torch", "torchvision", "sklearn", "matplotlib"}


# ---------------------------------------------------------------- exit codes


def test_exit_codes_come_from_one_table_shown_in_help(cli: Callable[..., Done]) -> None:
    lines = [line.strip() for line in cli("--help").out.splitlines()]
    assert all(f"{code}  {text}" in lines for code, text in EXIT_CODES.items())
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, KdError)]
    assert {c.exit_code for c in classes} <= set(EXIT_CODES)


FAILING = """
import kdcore
from kdcore import errors

@kdcore.hookimpl
def kdcore_register(registry):
    registry.command("fail", fail, about="fails as it is told")

def fail(kind: str):
    if kind == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if kind == "ZeroDivisionError":
        raise ZeroDivisionError("told so")
    if kind == "Interrupted":
        raise kdcore.Interrupted(15)
    raise getattr(kdcore, kind)("what", where="where", fix="Fix it.")
"""


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("RecipeError", 2),
        ("PluginError", 3),
        ("StorageError", 4),
        ("DataError", 5),
        ("NumericError", 6),
        ("DeviceError", 7),
        ("PlanError", 8),
        ("PreflightError", 9),
        ("Interrupted", 143),
        ("ZeroDivisionError", 3),
        ("KeyboardInterrupt", 130),
    ],
)
def test_every_error_has_its_exit_code(
    kind: str, code: int, install: Callable[..., Path], cli: Callable[..., Done]
) -> None:
    install("failing", FAILING)
    done = cli("fail", kind)
    assert done.code == code
    if kind.endswith("Error") and kind != "ZeroDivisionError":
        assert done.err == f"kdcore: {kind}: where: what. Fix it.\n"


def test_bug_is_called_a_bug_and_shows_its_traceback(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]
) -> None:
    monkeypatch.setattr("kdcore.cli.drive.load", lambda *_: 1 / 0)
    done = cli("run", tiny())
    assert done.code == 1
    assert "ZeroDivisionError" in done.err
    assert done.err.rstrip().splitlines()[-1].startswith("kdcore: this is a bug in kdcore")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("rnu",), "No such command 'rnu'"),
        (("run",), "Missing argument 'RECIPE'"),
        (("run", "x.toml", "--epochs", "3"), "No such option: --epochs"),
        (("run", "x.toml", "--jobs", "0"), "--jobs"),
        (("run", "none.toml"), "none.toml: no such file. Give the path of a .toml recipe."),
        (
            ("run", "x.toml", "-p", "vision"),
            "-p: 'vision' leaves nothing out. Write -p no:NAME; --plugin-file loads a file.",
        ),
        (("run", "x.toml", "-p", "no:visoin"), "-p no:visoin: no plugin 'visoin' to leave out. Did you mean 'vision'?"),
        (("run", "x.toml", "-p", "no:core"), "-p no:core: no plugin 'core' to leave out."),
        (("resume", "nowhere"), "nowhere/run.json: no such file. Give the folder of a run"),
        (("report", "nowhere"), "nowhere: no run of kdcore. Give its folder"),
    ],
)
def test_wrong_command_line_exits_2(arguments: tuple[str, ...], says: str, cli: Callable[..., Done]) -> None:
    done = cli(*arguments)
    assert done.code == 2
    assert says in re.sub(r"[│\s]+", " ", done.err)
    assert "Traceback" not in done.err


def test_given_plugin_file_must_load(cli: Callable[..., Done], tiny: Callable[..., Path], tmp_path: Path) -> None:
    done = cli("run", tiny(), "--plugin-file", "none.py")
    assert done.code == 3
    assert done.err.startswith("kdcore: PluginError: --plugin-file none.py: none: no such file")
    (tmp_path / "wrong_file.py").write_text("1 / 0")
    assert "wrong_file: ZeroDivisionError" in cli("plan", tiny(), "--plugin-file", "wrong_file.py").err
    assert "BROKEN  wrong_file: ZeroDivisionError" in cli("plugins", "--plugin-file", "wrong_file.py").out


@pytest.mark.parametrize("content", ["", "[]", "{}", "no json", '{"recipe": 1}'])
def test_damaged_run_folder_is_refused(content: str, cli: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    done = cli("resume", tmp_path)
    assert done.code == 2
    assert str(tmp_path / "run.json") in done.err


# ---------------------------------------------------------------- help, plugins, doctor


def test_every_command_has_help(cli: Callable[..., Done]) -> None:
    text = cli("--help").out
    for command in BUILT_IN:
        assert re.search(rf"│ {command} +\w", text)
        assert cli(command, "--help").code == 0
    assert cli("--version").out == f"kdcore {__version__}\n"


def test_plugins_prints_one_row_a_kind_and_plugin(cli: Callable[..., Done]) -> None:
    done = cli("plugins")
    assert done.code == 0
    first = [[cell.strip() for cell in line.split("│")[1:3]] for line in done.out.splitlines() if line.startswith("│")]
    rows = [tuple(row) for row in first if row[0]]
    assert len(rows) == len(set(rows))
    assert ("model", f"vision (kdcore {__version__})") in rows
    assert len(done.out.splitlines()) < 150  # of some 170 things
    for name in ("resnet18", "cross_entropy", "dskd", "assistants", "digits"):
        assert name in done.out


def test_plugins_lists_one_plugin_or_one_kind(cli: Callable[..., Done]) -> None:
    features, losses = cli("plugins", "features"), cli("plugins", "--kind", "loss")
    assert "fitnet" in features.out
    assert "conv1x1" in features.out
    assert "dkd" not in features.out
    assert "fitnet" in losses.out
    assert "dkd" in losses.out
    assert "conv1x1" not in losses.out
    assert cli("plugins", "--kind", "los").err == "kdcore: RecipeError: --kind: no kind 'los'. Did you mean 'loss'?\n"


def test_the_options_of_a_name_end_with_the_keys_of_its_table(cli: Callable[..., Done]) -> None:
    out = cli("plugins", "dkd").out
    keys = re.findall(r"^│ (\w+) ", out, re.M)
    assert keys[-5:] == ["beta", "name", "weight", "warmup_epochs", "schedule"]
    assert "The last 4 are keys of its table" in out


def test_observers_are_listed(install: Callable[..., Path], cli: Callable[..., Done]) -> None:
    install("nosy", "import kdcore\n@kdcore.hookimpl\ndef kdcore_log_line(step):\n    pass")
    assert re.search(r"observer *│ nosy \(nosy-dist 1\.0\) *│ kdcore_log_line", cli("plugins").out)


def test_doctor_names_versions_back_ends_and_broken_plugins(
    install: Callable[..., Path], cli: Callable[..., Done]
) -> None:
    install("acme", "raise RuntimeError('[/bold] is no markup')")
    done = cli("doctor")
    assert done.code == 0
    for text in ("kdcore", "torch", "CUDA devices", "reference", "vision", "acme (acme-dist 1.0)", "[/bold]"):
        assert text in done.out
    assert re.search(r"convolutions +│ on the CPU bfloat16 takes \d+\.\d\d times the seconds of float32", done.out)


# ---------------------------------------------------------------- a whole run


def test_plan_prints_stages_and_cost_and_runs_nothing(
    cli: Callable[..., Done], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    done = cli("plan", tiny())
    assert done.code == 0
    assert "mlp-2 on labels" in done.out
    assert "mlp-2 -> mlp-1" in done.out
    assert re.findall(r"[\d.]+ MFLOPs", done.out) == ["36.8 MFLOPs", "17.2 MFLOPs", "54 MFLOPs"]
    assert "to train: 54 MFLOPs (" in done.out
    assert not (tmp_path / "runs").exists()


def test_run_report_resume_and_store_end_to_end(
    shell: Callable[..., Done],
    cli: Callable[..., Done],
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny("objective = [{ loss = 'cross_entropy' }, { loss = 'dkd', weight = 2 }]")
    done = shell("-m", "kdcore", "run", recipe, "--set", "train.epochs=2")
    assert done.code == 0, done.err
    assert done.err == ""
    assert re.search(r"student +│ mlp-1 +│ +\d", done.out)
    folder = next(tmp_path.glob("runs/tiny-*"))
    kept = ("run.json", "result.json", "report.html", "student.safetensors", "journal.jsonl")
    assert all((folder / name).stat().st_size for name in kept)
    result = json.loads((folder / "result.json").read_text())
    assert result["recipe"]["train"]["epochs"] == 2
    assert result["degraded"] == {}

    again = cli("run", recipe, "--set", "train.epochs=2")
    assert (again.code, again.out.count("(from the store)")) == (0, 2)
    student = (folder / "student.safetensors").read_bytes()
    (folder / "student.safetensors").unlink()
    (folder / "report.html").unlink()
    assert cli("report", folder).out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").stat().st_size
    monkeypatch.chdir(folder)
    resumed = cli("resume", folder)  # from any folder
    assert (resumed.code, resumed.out.count("(from the store)")) == (0, 2)
    assert (folder / "student.safetensors").read_bytes() == student
    monkeypatch.chdir(tmp_path)

    listed = cli("store", "ls").out
    assert "mlp-2 -> mlp-1" in listed
    assert cli("store", "gc", "--dry-run").out == "0 folders would be removed\n"
    assert cli("store", "pack", "all.tar").out == "2 results in all.tar\n"
    assert cli("store", "unpack", "all.tar", "--store", "other").out == "2 new results\n"
    assert cli("store", "ls", "--store", "other").out == listed
    assert cli("plan", recipe, "--set", "train.epochs=2").out.count("yes") == 2


def test_resume_minds_no_plugin_that_the_recipe_does_not_name(
    cli: Callable[..., Done], tiny: Callable[..., Path], install: Callable[..., Path], tmp_path: Path
) -> None:
    assert cli("run", tiny()).code == 0
    install("acme", "import kdcore\n@kdcore.hookimpl\ndef kdcore_log_line(step):\n    pass")
    assert cli("resume", next(tmp_path.glob("runs/tiny-*"))).code == 0


@pytest.mark.parametrize("command", [("store", "unpack", "none.tar"), ("store", "pack", "no/folder/x.tar")])
def test_store_commands_say_what_is_missing(command: tuple[str, ...], cli: Callable[..., Done]) -> None:
    done = cli(*command)
    assert done.code in (2, 4), done.err
    assert "Traceback" not in done.err
