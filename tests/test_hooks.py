"""What plugins rely on changes only on purpose: noticed changes raise HOOKS_VERSION, all of them are recorded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from contract import ANYWHERE, RECORD, contract, lines, noticed, record, recorded, verdict

import kdcore.data
import kdcore.losses
from kdcore import hookspecs
from kdcore.registry import KINDS, REQUIRED, Registrar


def test_no_plugin_can_notice_a_change_without_a_new_version_of_the_hooks() -> None:
    assert not verdict(recorded(), contract()), verdict(recorded(), contract())


def test_what_is_added_is_recorded() -> None:
    assert recorded() == contract(), "the contract grew: `make hooks` records it"
    assert lines(contract()) == RECORD.read_text()


def test_the_record_holds_every_hook_every_kind_and_every_protocol() -> None:
    found = recorded()
    assert set(found["hooks"]) == {name for name in vars(hookspecs) if name.startswith("kdcore_")}
    assert {f"Registrar.{kind}" for kind in KINDS} == {
        name for name in found["called"] if name.startswith("Registrar.")
    }
    assert set(KINDS) == {name for name in vars(Registrar) if not name.startswith("_")}
    assert {"StepContext.step", "StepContext.trained", "StepContext.sources"} <= set(found["called"])
    beside = {f"{package}.{name}" for package in ("data", "losses") for name in getattr(kdcore, package).__all__}
    assert {name for name in beside if name.partition(".")[2] not in kdcore.__all__} <= set(found["names"])
    protocols = {name.partition(".")[0] for name in found["implemented"]}
    stages = {"Controller", "FailurePolicy", "Images", "Loss", "Source"}
    assert protocols == stages | {"Executor", "Exporter", "Strategy", "Worker"}
    required = {(kind.title().replace("_", ""), name) for kind, names in REQUIRED.items() for name in names}
    assert {f"{protocol}.{name}" for protocol, name in required} <= set(found["implemented"])


# ---------------------------------------------------------------- the comparison, on made-up changes


def row(name: str, annotation: str = "int", kind: str = ANYWHERE, default: str | None = None) -> dict[str, str]:
    made = {"name": name, "annotation": annotation}
    return made | ({"kind": kind} if kind != ANYWHERE else {}) | ({"default": default} if default is not None else {})


NEW, BY_NAME = row("new", default="0"), row("word", kind="keyword_only")
KEY, RETURN = row("key", kind="keyword_only"), row("return", "str")
OLD = {
    "HOOKS_VERSION": 1,
    "hooks": {"kdcore_x": [row("run"), row("step")]},
    "called": {
        "Term": [row("loss"), row("weight", default="1.0")],
        "suggest": [row("word"), KEY, RETURN],
    },
    "implemented": {"Loss.build": [row("shapes"), row("options")], "Loss.needs": [row("return", "frozenset[str]")]},
    "required": ["loss.build"],
    "names": ["Loss", "Term"],
    "decisions": ["Drop", "Set"],
    "targets": ["model: build(options, data)"],
}


def changed(part: str, name: str, signature: list[dict[str, str]] | None) -> list[str]:
    """What is noticed if one signature becomes another, or nothing."""
    new = copy.deepcopy(OLD)
    if signature is None:
        del new[part][name]
    else:
        new[part][name] = signature
    return noticed(OLD, new)


@pytest.mark.parametrize(
    ("part", "name", "signature", "says"),
    [
        ("hooks", "kdcore_x", None, "kdcore_x is gone"),
        ("hooks", "kdcore_x", [row("run")], "argument 'step' is gone"),
        ("hooks", "kdcore_x", [row("run"), row("iteration")], "argument 'step' is gone"),
        ("hooks", "kdcore_x", [row("run"), row("step", "float")], "'step' was int, now it is float"),
        ("called", "suggest", None, "suggest is gone"),
        ("called", "Term", [row("weight", default="1.0")], "argument 'loss' is gone"),
        ("called", "Term", [row("loss"), row("weight", default="2.0")], "'weight' was 1.0 by default, now it is 2.0"),
        ("called", "Term", [row("loss"), row("weight")], "'weight' was 1.0 by default, now it has to be given"),
        ("called", "Term", [*OLD["called"]["Term"], row("new")], "new argument 'new' has no default"),
        ("called", "Term", [row("loss"), NEW, row("weight", default="1.0")], "now they are (loss, new, weight)"),
        ("called", "suggest", [BY_NAME, KEY, RETURN], "'word' is keyword_only now"),
        ("called", "suggest", [row("word", "str"), KEY, RETURN], "'word' was int, now it is"),
        ("called", "suggest", [row("word"), KEY, row("return", "str | int")], "'return' was str, now it is"),
        ("called", "suggest", [*OLD["called"]["suggest"], row("x", "None | int")], "new argument 'x' has no default"),
        ("called", "Term", [row("loss", "int | str"), row("weight", default="1.0")], "'loss' was int, now it"),
        ("implemented", "Loss.build", None, "Loss.build is gone"),
        ("implemented", "Loss.build", [row("shapes"), row("settings")], "argument 'options' is gone"),
        ("implemented", "Loss.build", [row("options"), row("shapes")], "now they are (options, shapes)"),
        ("implemented", "Loss.build", [row("shapes"), row("options"), NEW], "now they are (shapes, options, new)"),
        ("implemented", "Loss.build", [*OLD["implemented"]["Loss.build"], BY_NAME], "(shapes, options, word)"),
        ("implemented", "Loss.reset", [row("return", "None")], "Loss.reset has to be implemented now"),
    ],
)  # fmt: skip
def test_a_change_that_a_plugin_can_notice_is_said(
    part: str, name: str, signature: list[dict[str, str]] | None, says: str
) -> None:
    (change,) = changed(part, name, signature)
    assert says in change
    assert name in change


@pytest.mark.parametrize(
    ("part", "old", "new", "says"),
    [
        ("names", "Term", "Summand", "Term is gone"),
        ("decisions", "Drop", "End", "Drop is gone"),
        ("targets", "model: build(options, data)", "model: build(data)", "build(options, data) is gone"),
        ("required", "loss.build", "loss.make", "loss.make has to be implemented now"),
    ],
)
def test_a_word_that_goes_is_said(part: str, old: str, new: str, says: str) -> None:
    other = {**OLD, part: [new if word == old else word for word in OLD[part]]}
    assert any(says in change for change in noticed(OLD, other))


@pytest.mark.parametrize(
    ("part", "name", "signature"),
    [
        ("hooks", "kdcore_y", [row("run")]),
        ("hooks", "kdcore_x", [row("stage"), row("step"), row("run")]),
        ("called", "Term", [*OLD["called"]["Term"], NEW]),
        ("called", "Term", [*OLD["called"]["Term"], row("more", kind="var_keyword")]),
        ("called", "Term", [row("loss", default="'kd'"), row("weight", default="1.0")]),
        (
            "called",
            "suggest",
            [row("word"), row("key", kind="keyword_only"), row("n", kind="keyword_only", default="1"), RETURN],
        ),
        ("called", "suggest", [row("word"), row("key"), RETURN]),
        ("called", "suggest", [row("word", "int | str"), KEY, RETURN]),
        ("called", "suggest", [*OLD["called"]["suggest"], row("x", "None | int", default="None")]),
        ("called", "Stage.outputs", [row("return", "None")]),
        ("implemented", "Exporter.write", [row("path")]),
    ],
)
def test_an_addition_that_no_plugin_can_notice_is_not(part: str, name: str, signature: list[dict[str, str]]) -> None:
    assert changed(part, name, signature) == []


def test_new_names_decisions_and_kinds_are_not_noticed() -> None:
    more = {
        part: [*OLD[part], new]
        for part, new in (("names", "Next"), ("decisions", "Retry"), ("required", "exporter.write"))
    }
    assert noticed(OLD, {**OLD, **more}) == []


def test_a_noticed_change_wants_a_new_version_and_says_what_to_do() -> None:
    new = {**OLD, "hooks": {}}
    assert "kdcore_x is gone" in verdict(OLD, new)
    assert "raise HOOKS_VERSION" in verdict(OLD, new)
    assert verdict(OLD, {**new, "HOOKS_VERSION": 2}) == ""
    assert "fell from 1 to 0" in verdict(OLD, {**OLD, "HOOKS_VERSION": 0})
    assert verdict(OLD, OLD) == ""


def test_make_hooks_refuses_to_record_a_noticed_change(tmp_path: Path) -> None:
    path, now = tmp_path / "hooks.json", contract()
    more = {**now, "hooks": {**now["hooks"], "kdcore_more": []}}
    path.write_text(lines(more))
    with pytest.raises(SystemExit, match="kdcore_more is gone"):
        record(path)
    assert recorded(path) == more
    path.write_text(lines({**more, "HOOKS_VERSION": now["HOOKS_VERSION"] - 1}))
    record(path)
    assert recorded(path) == now
