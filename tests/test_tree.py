"""The tree of chains while a run grows it: from events alone, whatever their order, and as a person sees it."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small import RECIPE, die_at_step_30, make_run

from kdcore.chains import label
from kdcore.cli.console import RunConsole
from kdcore.cli.tree import Growth, choice_text
from kdcore.cli.treeconsole import TreeConsole, TreeView
from kdcore.errors import Interrupted
from kdcore.report.tables import choices

OFF = {"kind": "set", "target": "student.kd.weight", "value": 0.0, "reason": "", "controller": "dskd"}


# ---------------------------------------------------------------- made-up runs


def labels(model, role="teacher", seed=0):
    """A label-only stage; its key says what it is."""
    members = {role: {"model": model, "trained": True}}
    return stage(f"{model} {role} {seed}", members, seed, [], {}, {})


def distilled(model, teacher, *, dskd=True, control="", key=""):
    """A stage that distils the last member of the stage ``teacher`` into ``model``."""
    members = {"student": {"model": model, "trained": True}, "teacher": {"model": "", "trained": False}}
    link = {"stage": teacher["key"], "member": next(iter(teacher["members"]))}
    uses = {"control": {"stage": control, "member": "control"}} if control else {}
    key = key or f"{teacher['key']} > {model}{'' if dskd else ' bare'}"
    return stage(key, members, teacher["seed"], ["dskd"] if dskd else [], {"teacher": link}, uses)


def stage(key, members, seed, controllers, inputs, uses):
    return {
        "key": key, "name": key, "seed": seed, "length": 10, "controllers": controllers, "inputs": inputs,
        "uses": uses, "members": members,
    }  # fmt: skip


def asked(*stages):
    return {"kind": "asked", "stages": list(stages)}


def started(found, tick=0, events=()):
    return {
        "kind": "stage_started", "key": found["key"], "tick": tick, "ticks": 10, "every": "epoch", "step": 0,
        "events": list(events),
    }  # fmt: skip


def ticked(found, tick, accuracy):
    metrics = {name: {"accuracy": accuracy} for name, member in found["members"].items() if member["trained"]}
    return {"kind": "tick", "key": found["key"], "tick": tick, "ticks": 10, "metrics": metrics}


def decided(found, epoch):
    return {"kind": "decision", "key": found["key"], "event": {**OFF, "epoch": epoch}}


def finished(found, accuracy, stopped=None, reused=False, **others):
    members = {
        name: {"monitor_accuracy": others.get(name, accuracy), "trained": member["trained"]}
        for name, member in found["members"].items()
    }
    events = [] if stopped is None else [{**OFF, "epoch": stopped}]
    result = {"members": members, "events": events, "tick": "epoch", "ticks": 10, "reused": reused}
    return {"kind": "stage_finished", "key": found["key"], "name": found["key"], "result": result}


def chosen(found, text="chosen", margin=None, error=None):
    is_noise = margin is not None and error is not None and abs(margin) < error
    best = {"stage": found["key"], "member": "student"}
    return {"kind": "choice", "text": text, "margin": margin, "error": error, "is_noise": is_noise, "best": best}


def grown(*events):
    growth = Growth()
    for event in events:
        growth.add(event)
    return growth.tree()


def shape(node):
    """The models below a node, as nested lists."""
    return [node.chain[-1], *(shape(child) for child in node.children)]


def shown(tree, width=80, height=50, whole=False, **options):
    """What a terminal of this size shows."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False, **options)
    console.print(TreeView(tree, whole))
    return console.file.getvalue()


TEACHER = labels("mlp-10")
CONTROL = labels("mlp-2", "control")
DIRECT = distilled("mlp-2", TEACHER, control=CONTROL["key"])
ASSISTANT = distilled("mlp-8", TEACHER)
LONG = distilled("mlp-2", ASSISTANT, control=CONTROL["key"])
BARE = distilled("mlp-2", TEACHER, dskd=False)


# ---------------------------------------------------------------- what stands where


def test_a_model_stands_under_the_one_that_taught_it_and_a_shared_one_stands_once():
    tree = grown(asked(TEACHER, CONTROL, DIRECT), asked(ASSISTANT, LONG))
    assert [shape(root) for root in tree.roots] == [["mlp-10", ["mlp-2"], ["mlp-8", ["mlp-2"]]], ["mlp-2"]]
    assert [root.role for root in tree.roots] == ["", "control"]


def test_the_seeds_of_a_chain_are_one_node():
    stages = [s for seed in (2, 0, 1) for s in [labels("mlp-4", seed=seed)] for s in (s, distilled("mlp-2", s))]
    accuracies = {0: 0.96, 1: 0.97, 2: 0.98}
    tree = grown(asked(*stages), *(finished(s, accuracies[s["seed"]], stopped=s["seed"] + 4) for s in stages))
    assert [shape(root) for root in tree.roots] == [["mlp-4", ["mlp-2"]]]
    assert "97.00 ± 1.00" in shown(tree)
    assert shown(tree).splitlines()[1].split() == ["model", "mean", "±", "sd", "at"]
    assert "±" not in shown(grown(asked(TEACHER), finished(TEACHER, 0.9)))
    assert "4, 5, 6" in shown(tree)


def test_a_chain_without_controllers_is_a_number_on_the_same_chains_node():
    bare_long = distilled("mlp-2", distilled("mlp-8", TEACHER, dskd=False), dskd=False)
    stages = (TEACHER, DIRECT, BARE, ASSISTANT, LONG, distilled("mlp-8", TEACHER, dskd=False), bare_long)
    tree = grown(asked(*stages), finished(LONG, 0.95), finished(bare_long, 0.9731))
    assert [shape(root) for root in tree.roots] == [["mlp-10", ["mlp-2"], ["mlp-8", ["mlp-2"]]]]
    row = shown(tree).splitlines()[-1].split()
    assert row == ["└──", "mlp-2", "done", "95.00", "97.31"]
    assert "without" in shown(tree)


def test_without_any_controller_a_chain_has_its_own_number():
    tree = grown(asked(TEACHER, BARE), finished(TEACHER, 0.9), finished(BARE, 0.95))
    assert "95.00" in shown(tree)
    assert "without" not in shown(tree)


def test_equal_chains_of_one_seed_stand_side_by_side():
    other = distilled("mlp-2", TEACHER, key="another temperature")
    tree = grown(asked(TEACHER, DIRECT, other))
    assert [shape(root) for root in tree.roots] == [["mlp-10", ["mlp-2"], ["mlp-2"]]]


def test_a_control_that_trains_beside_the_student_is_none_of_the_teachers_children():
    beside = distilled("mlp-2", TEACHER)
    beside = {**beside, "members": {**beside["members"], "control": {"model": "mlp-2", "trained": True}}}
    tree = grown(asked(TEACHER, beside), finished(beside, 0.96, control=0.95))
    assert [shape(root) for root in tree.roots] == [["mlp-10", ["mlp-2"]], ["mlp-2"]]
    assert "+1.00" in shown(tree)


def test_a_given_teacher_is_the_root_of_its_chains():
    members = {"teacher": {"model": "cnn-3", "trained": False}}
    given_one = stage("given", members, 0, [], {}, {})
    assert [shape(root) for root in grown(asked(given_one, distilled("mlp-2", given_one))).roots] == [
        ["cnn-3", ["mlp-2"]]
    ]


# ---------------------------------------------------------------- how far it is


def test_a_node_says_how_far_its_model_is():
    script = [asked(TEACHER, CONTROL, DIRECT), finished(TEACHER, 0.99), finished(CONTROL, 0.965, reused=True)]
    assert "waiting" in shown(grown(*script))
    script += [started(DIRECT), ticked(DIRECT, 3, 0.9)]
    assert "epoch 3/10" in shown(grown(*script))
    within = {"kind": "log", "key": script[-1]["key"], "done": 3.44}
    assert "epoch 3.4/10" in shown(grown(*script, within))
    assert "90.00" in shown(grown(*script))
    script += [decided(DIRECT, 4), ticked(DIRECT, 5, 0.91)]
    row = shown(grown(*script)).splitlines()[3].split()
    assert row == ["└──", "mlp-2", "epoch", "5/10", "91.00", "4"]
    script += [finished(DIRECT, 0.97, stopped=4)]
    assert shown(grown(*script)).splitlines()[3].split() == ["└──", "mlp-2", "97.00", "4", "+0.50"]
    assert "reused" in shown(grown(*script)).splitlines()[4]


def test_several_seeds_at_once_are_counted():
    teachers = [labels("mlp-4", seed=seed) for seed in range(3)]
    script = [asked(*teachers), finished(teachers[0], 0.9), *map(started, teachers[1:]), ticked(teachers[1], 2, 0.5)]
    assert "1/3 seeds done, epoch 2, 0/10" in shown(grown(*script), width=120)
    assert "90.00" in shown(grown(*script))
    assert "50.00" not in shown(grown(*script))


def test_what_is_done_says_so_until_all_is():
    teachers = [labels("mlp-4", seed=seed) for seed in range(2)]
    script = [asked(*teachers, DIRECT), finished(DIRECT, 0.9), finished(teachers[0], 0.9)]
    teacher, direct = shown(grown(*script)).splitlines()[2:]
    assert (teacher.split()[:4], direct.split()[:2]) == (["mlp-4", "1/2", "seeds", "done"], ["mlp-2", "done"])
    assert "done" not in shown(grown(*script, finished(teachers[1], 0.9)))


def test_of_many_seeds_the_mean_of_the_stops_is_shown():
    teachers = [labels("mlp-4", seed=seed) for seed in range(5)]
    students = [distilled("mlp-2", teacher) for teacher in teachers]
    stops = [4, 5, None, 6, 5]
    ends = [finished(student, 0.9, stopped=stop) for student, stop in zip(students, stops, strict=True)]
    assert "5.0 in 4 of 5" in shown(grown(asked(*teachers, *students), *ends))


def test_a_stage_that_goes_on_remembers_its_stop_and_one_that_is_tried_again_forgets_it():
    begun = [asked(TEACHER, DIRECT), started(DIRECT), decided(DIRECT, 4)]
    goes_on = grown(asked(TEACHER, DIRECT), started(DIRECT, 5, [{**OFF, "epoch": 4}]))
    again = grown(*begun, started(DIRECT, 2))
    assert [tree.roots[0].children[0].learners[0].stopped for tree in (goes_on, again)] == [4, None]


LIVES = [
    [started(s), ticked(s, 1, 0.5), decided(s, 1), ticked(s, 2, 0.6), finished(s, accuracy, stopped=1)]
    for s, accuracy in ((TEACHER, 0.99), (CONTROL, 0.9), (DIRECT, 0.95), (ASSISTANT, 0.96), (LONG, 0.97), (BARE, 0.94))
]


@given(st.permutations([i for i, life in enumerate(LIVES) for _ in life]))
def test_stages_at_the_same_time_grow_the_tree_of_stages_one_by_one(order):
    script = asked(TEACHER, CONTROL, DIRECT, ASSISTANT, LONG, BARE)
    lives = [iter(life) for life in LIVES]
    assert grown(script, *(next(lives[i]) for i in order)) == grown(
        script, *(event for life in LIVES for event in life)
    )


def test_events_of_what_nobody_asked_for_change_nothing():
    script = [asked(TEACHER), finished(TEACHER, 0.9)]
    others = [started(DIRECT), ticked(DIRECT, 1, 0.5), finished(DIRECT, 0.9), {"kind": "warning", "text": "t"}]
    assert grown(*script, *others) == grown(*script)
    assert grown(*script, chosen(DIRECT)).roots == grown(*script).roots


# ---------------------------------------------------------------- as a person sees it


def test_the_best_chain_so_far_is_bold():
    tree = grown(asked(TEACHER, DIRECT, ASSISTANT, LONG), chosen(DIRECT), chosen(LONG))
    best = [[node.is_best, *(child.is_best for child in node.children)] for node in tree.roots]
    assert best == [[True, False, True]]
    assert tree.roots[0].children[1].children[0].is_best
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(TreeView(tree))
    bold = [line for line in console.file.getvalue().splitlines()[1:] if "\x1b[1m" in line]
    assert ["mlp-10" in bold[0], "mlp-8" in bold[1], len(bold)] == [True, True, 3]


def large(count=3):
    """A tree four deep, with all that a node can have, under some seeds."""
    script = []
    for seed in range(count):
        chain = [labels("resnet-12", seed=seed)]
        for model in ("resnet-10", "resnet-8", "resnet-2"):
            control = labels(model, "control", seed=seed)
            bare = distilled(model, chain[-1], dskd=False)
            chain.append(distilled(model, chain[-1], control=control["key"]))
            script += [asked(control, chain[-1], bare)]
            script += [finished(control, 0.9), finished(bare, 0.95 + seed / 100)]
        script += [asked(chain[0]), *(finished(s, 0.9 + seed / 100, stopped=10 + seed) for s in chain)]
    return script


def test_no_number_is_cut_on_80_columns():
    text = shown(grown(*large()))
    assert max(map(len, text.splitlines())) <= 80
    (row,) = [line for line in text.splitlines() if "└── resnet-2" in line]
    assert row.endswith("91.00 ± 1.00  10, 11, 12    +1.00  96.00 ± 1.00")


@pytest.mark.parametrize("width", [40, 52, 66, 79])
def test_a_narrow_terminal_leaves_out_columns_and_shows_the_others_whole(width):
    running = distilled("resnet-4", labels("resnet-12"))
    text = shown(grown(*large(), asked(running), started(running, tick=3)), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "epoch 3/10" in text


def test_a_low_terminal_leaves_out_finished_chains_but_not_the_best():
    others = [distilled(f"mlp-{size}", TEACHER) for size in range(3, 40)]
    running = others[-1]
    script = [asked(TEACHER, DIRECT, *others), *(finished(s, 0.9) for s in (TEACHER, DIRECT, *others[:-1]))]
    tree = grown(*script, started(running), chosen(DIRECT, "the direct one"))
    lines = shown(tree, height=24).splitlines()
    assert len(lines) < 24
    assert [line.split()[-1] for line in lines[1:4]] == ["90.00", "90.00", "0/10"]
    assert lines[4:] == ["(not shown: 36 finished models)", "the direct one"]
    assert len(shown(tree, height=24, whole=True).splitlines()) == 1 + 1 + 1 + len(others)


def test_a_terminal_without_unicode_shows_the_tree_too():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80)
    console.print(TreeView(grown(*large())))
    console.file.flush()
    assert b"`-- resnet-2" in console.file.buffer.getvalue()
    assert b"91.00 +- 1.00" in console.file.buffer.getvalue()


def test_a_line_for_a_terminal_without_unicode_has_none(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    RunConsole().handle(chosen(LONG, "10-8-2 instead of 10-2", 0.01, 0.002))
    sys.stdout.flush()
    assert b"+1.00 points +- 0.20" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize(
    ("models", "name"),
    [
        (["mlp-10", "mlp-8", "mlp-2"], "10-8-2"),
        (["cnn-3", "mlp-4"], "cnn-3 > mlp-4"),
        (["resnet18", "resnet18"], "resnet18 > resnet18"),
        (["acme-big", "acme-small"], "acme-big > acme-small"),
    ],
)
def test_a_chain_is_named_by_sizes_where_its_models_are_of_one_family(models, name):
    assert label(models) == name


@pytest.mark.parametrize("numbers", [(0.0012, 0.002), (0.002, 0.002), (0.021, 0.01), (0.0, 0.0), (0.0, 0.01)])
def test_a_choice_is_said_with_its_margin_and_weighed_as_in_the_report(numbers):
    event = chosen(LONG, "10-8-2 instead of 10-2", *numbers)
    ((*_, weighed),) = choices([event]).rows
    margin, error = (100 * number for number in numbers)
    said = f"10-8-2 instead of 10-2: {margin:+.2f} points ± {error:.2f} (one standard error), {weighed}"
    assert choice_text(event) == said
    assert weighed in ("within noise", "above noise", "a tie")


def test_a_choice_without_an_error_or_a_margin_is_not_weighed():
    said = [choice_text(chosen(LONG, "10-8-2", *numbers)) for numbers in ((0.01,), ())]
    assert said == ["10-8-2: +1.00 points", "10-8-2"]


@pytest.mark.parametrize("console", [RunConsole, TreeConsole])
def test_choices_and_the_best_so_far_are_plain_lines(console, capsys):
    with console() as shown_by:
        shown_by.handle(chosen(LONG, "10-8-2 instead of 10-2", 0.01, 0.002))
        shown_by.handle({"kind": "best_so_far", "text": "10-8-2 instead of 10-2", "folder": "runs/x"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10-8-2 instead of 10-2: +1.00 points ± 0.20 (one standard error), above noise"
    assert lines[1] == "Best so far: 10-8-2 instead of 10-2. Its weights are runs/x/student.safetensors."
    assert lines[2] == "To go on: kdcore resume runs/x"


def test_a_stop_of_several_decisions_is_one_line_and_other_decisions_stay_as_they_are(capsys):
    def decide(found, **row):
        row = {**OFF, "tick": 25, "epoch": 25.0, "reason": "no gain", **row}
        return {"kind": "decision", "key": found["key"], "name": found["key"], "event": row}

    both = {"target": "student.cross_entropy.weight", "value": 1.0}
    script = [decide(DIRECT, value=0.5, tick=9), decide(DIRECT), decide(DIRECT, **both), decide(TEACHER)]
    with RunConsole() as console:
        for event in [asked(TEACHER, DIRECT), *script, decide(DIRECT, **both, reason="another")]:
            console.handle(event)
    direct, teacher = DIRECT["key"], TEACHER["key"]
    assert capsys.readouterr().out.splitlines() == [
        f"{direct}: epoch 9: dskd: student.kd.weight = 0.5 (no gain)",
        f"{direct}: epoch 25: dskd: distillation stopped (no gain)",
        f"{teacher}: epoch 25: dskd: student.kd.weight = 0.0 (no gain)",  # it learns from nobody
        f"{direct}: epoch 25: dskd: student.cross_entropy.weight = 1.0 (another)",
    ]


def interrupted(*events):
    with TreeConsole() as console:
        for event in [asked(TEACHER, DIRECT), *events]:
            console.handle(event)
        raise Interrupted(2)


def test_a_search_that_is_interrupted_before_its_first_choice_says_that_it_has_no_student(capsys):
    best = {"kind": "best_so_far", "text": "10-2", "folder": "runs/x"}
    for events, is_said in (((), True), ((chosen(DIRECT), best), False)):
        with pytest.raises(Interrupted, match=r"stopped by Ctrl-C\."):
            interrupted(*events)
        out = capsys.readouterr().out
        assert out.endswith("No student so far: the first chain is not finished.\n") == is_said
    with TreeConsole():
        pass
    assert "No student" not in capsys.readouterr().out


def test_a_chain_below_its_control_says_so(capsys):
    with TreeConsole() as console:
        for event in [asked(TEACHER, CONTROL, DIRECT), finished(CONTROL, 0.964), finished(DIRECT, 0.95)]:
            console.handle(event)
    assert capsys.readouterr().out.startswith("10-2: 95.00 % on the monitor split, 1.40 points below its control\n")


def test_without_a_terminal_a_finished_chain_is_one_line_and_the_tree_comes_last(capsys):
    with TreeConsole() as console:
        script = [asked(TEACHER, CONTROL, DIRECT, BARE, ASSISTANT, LONG), finished(TEACHER, 0.99)]
        script += [started(DIRECT), ticked(DIRECT, 1, 0.5), finished(CONTROL, 0.95), finished(DIRECT, 0.96, stopped=7)]
        for event in [*script, finished(BARE, 0.94), finished(ASSISTANT, 0.9), finished(LONG, 0.97)]:
            console.handle(event)
    lines = capsys.readouterr().out.splitlines()
    gain = "points above its control"
    assert lines[0] == f"10-2: 96.00 % on the monitor split, stopped at 7, 1.00 {gain}, 94.00 % without dskd"
    assert lines[1] == f"10-8-2: 97.00 % on the monitor split, 2.00 {gain}"
    assert [line.split()[0] for line in lines[4:]] == ["mlp-10", "├──", "└──", "└──", "mlp-2"]


# ---------------------------------------------------------------- real runs


def test_a_run_that_is_resumed_behind_its_stop_shows_it_at_once(tmp_path, capsys):
    recipe = {**RECIPE, "controller": [{"name": "earlystop", "fraction": 0.25}]}
    sets = ["train.epochs=4", "execute.checkpoint_seconds=0"]
    die_at_step_30(make_run(tmp_path, sets=sets, recipe=recipe))
    again = make_run(tmp_path, sets=sets, recipe=recipe)
    console = again.console = TreeConsole()
    trees, handle = [], console.handle
    console.handle = lambda event: (handle(event), trees.append((event["kind"], console.growth.tree())))
    again.execute()
    at_start = next(tree for kind, tree in trees if kind == "stage_started")
    teacher, (student,) = at_start.roots[0], at_start.roots[0].children
    assert teacher.learners[0].state == "reused"
    assert (student.learners[0].tick, student.learners[0].stopped) == (2, 1)
    assert trees[-1][1].roots[0].children[0].learners[0].stopped == 1


def test_a_search_shows_its_chains_and_the_table_that_compares_them(tiny, cli, tmp_path):
    strategy = """
    controller = [{ name = "dskd", patience = 1 }]
    [strategy]
    name = "search"
    candidates = [{ model = "mlp", size = 2 }]
    seeds = 2
    """
    command = ("search", tiny(strategy), "--mode", "exhaustive", "--set", "teacher.size=3")
    done = cli(*command)
    assert done.code == 0, done.err
    result = json.loads(next(tmp_path.glob("runs/tiny-*/result.json")).read_text())
    assert result["recipe"]["strategy"]["mode"] == "exhaustive"
    chosen_one, other = result["replicates"]
    assert {chosen_one, other} == {"3-1", "3-2-1"}
    first, second = done.out[done.out.index("\nchain ") :].splitlines()[2:4]
    assert (first.startswith(f"{chosen_one} (chosen)  "), second.startswith(f"{other}  ")) == (True, True)
    assert ["[" in row for row in (first, second)] == [name == "3-2-1" for name in (chosen_one, other)]
    tree = ["mlp-3", "├── mlp-1", "└── mlp-2", "    └── mlp-1", "mlp-1 on labels", "mlp-2 on labels"]
    assert all(f"\n{row} " in done.out for row in tree)
    again = cli(*command)
    assert again.out.count(", reused\n") == 2
    assert sum(" reused " in line for line in again.out.splitlines()) == len(tree)
    assert cli("resume", *tmp_path.glob("runs/tiny-*")).out.count(", reused\n") == 2


def test_a_recipe_without_a_search_is_refused_with_what_to_write(tiny, cli):
    done = cli("search", tiny())
    assert done.code == 2
    assert done.err.startswith(
        "kdcore: RecipeError: strategy.name: 'distill' grows no tree of chains. Write [strategy]"
    )
