"""The report of several chains: their tree, curves, convergence, choices, learners over seeds and costs."""

import json
import re
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results import distilled, on_labels
from test_report import FETCHING, FIXTURE, Page

from kdcore.report import render, tree

SIZES = (8, 6, 4, 2)
RISE = (0.5, 0.8, 0.9, 0.93, 0.94, 0.94, 0.94, 0.94)
SLOW = (0.4, 0.6, 0.7, 0.8, 0.88, 0.91, 0.92, 0.93)


def fixture():
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


def curve(accuracies):
    return [{"tick": i, "epoch": float(i), "accuracy": value} for i, value in enumerate(accuracies, 1)]


def taught(key, size, above, seed, accuracy, stopped, controlled):
    """A stage of eight epochs; the stop is after the second."""
    stage = distilled(key, f"mlp-{size}", above, stopped=250 if stopped else None, seed=seed, length=8, ticks=8)
    stage["controllers"] = ["dskd"] if controlled else []
    stage["events"] = [{**event, "tick": 2, "epoch": 2.0} for event in stage["events"]]
    stage["members"]["student"].update(test_accuracy=accuracy, curve=curve(RISE if controlled else SLOW))
    return stage


def exhaustive(seed, controlled, teacher):
    """All chains over 8, 6 and 4. Distillation stops below the first teacher, of mlp-4 under one seed alone."""
    found, by_label = [], {"10": teacher}
    for size in SIZES:
        for name, above in list(by_label.items()):
            if not name.endswith("-2"):
                key = f"{name}-{size}"
                accuracy = 0.9 + 0.001 * len(by_label) + 0.01 * seed + 0.002 * controlled
                stopped = controlled and name == "10" and (size, seed) != (4, 1)
                by_label[key] = taught(f"{key}.{seed}.{controlled}", size, above, seed, accuracy, stopped, controlled)
                found.append(by_label[key])
    return found


def searched(seeds=(0, 1), variants=(True, False), chosen="10-8-2"):
    """The result of an exhaustive search; ``chosen`` of the first seed is delivered."""
    result = fixture()
    stages, replicates = [], {}
    for seed in seeds:
        teacher = on_labels(f"10.{seed}", "mlp-10", seed=seed)
        own = [stage for controlled in variants for stage in exhaustive(seed, controlled, teacher)]
        for stage in (s for s in own if s["members"]["student"]["model"] == "mlp-2"):
            name = stage["name"].split(".")[0] + " without dskd" * (not stage["controllers"])
            ref = {**stage["members"]["student"], "stage": stage["key"], "member": "student", "seed": seed}
            replicates.setdefault(name, []).append(ref)
        stages += [teacher, *own]
    end = next(stage for stage in stages if stage["key"] == f"{chosen}.{seeds[0]}.{variants[0]}")
    chain = [{"stage": f"10.{seeds[0]}", "member": "teacher"}, {"stage": end["key"], "member": "student"}]
    delivered = {**end["members"]["student"], **chain[-1]}
    return {**result, "stages": stages, "chain": chain, "student": delivered, "replicates": replicates}


@pytest.fixture(scope="module")
def made():
    return searched()


@pytest.fixture(scope="module")
def text(made):
    return render(made)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def labels(page, begins):
    return [value for name, value in page.attributes if name == "aria-label" and value.startswith(begins)]


def accuracy(result, label, controlled=True):
    """Mean and deviation over seeds, as the page shows them."""
    stages = [s for s in result["stages"] if s["key"].startswith(f"{label}.") and bool(s["controllers"]) == controlled]
    found = [stage["members"]["student"]["test_accuracy"] for stage in stages]
    return f"{100 * mean(found):.2f}\u00a0% ±\u00a0{100 * stdev(found):.2f}".replace("% ±", "%\u00a0±")


def test_the_tree_names_every_model_of_the_chosen_variant_once_with_accuracy_and_stop(made, page):
    across, down = labels(page, "mlp-10: ")
    assert across == down
    nodes = dict(text.split(": ", 1) for text in across.split("; "))
    assert len(nodes) == across.count(";") + 1 == 16
    assert nodes["10-8-2"] == f"{accuracy(made, '10-8-2')}, no stop, chosen"
    assert nodes["10-2"] == f"{accuracy(made, '10-2')}, stop 2"
    assert nodes["10-4"] == f"{accuracy(made, '10-4')}, stop 2 (1/2)"
    assert [name for name, said in nodes.items() if said.endswith("chosen")] == ["mlp-10", "10-8", "10-8-2"]
    assert "Drawn are the chains with dskd." in page.text


def test_the_page_of_a_search_is_as_safe_and_accessible_as_any_other(text, page):
    assert not FETCHING & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert all('role="img" aria-label="' in tag for tag in re.findall(r"<svg[^>]*>", text))
    assert all("scope=" in tag for tag in re.findall(r"<th\b[^>]*>", text))


def test_each_chain_has_its_curves_with_and_without_controllers_on_one_scale(page, text):
    found = labels(page, "Monitor accuracy, 10-")
    assert len(found) == 8
    assert found[0].startswith(
        "Monitor accuracy, 10-8-2 (chosen): with dskd 94.00\u00a0% at the end, mean of 2; without"
    )
    assert "10-8-2 (chosen): 94.00\u00a0% with dskd, 93.00\u00a0% without controllers" in page.texts
    assert any(re.search(r"10-2: .*stopped at epoch 2, 2; without controllers 93.00", label) for label in found)
    drawn = [svg for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "Monitor accuracy, 10-" in svg]
    assert len({tuple(re.findall(r">(\d+%|\d+\.\d+%)</text>", svg)) for svg in drawn}) == 1


def test_a_figure_says_in_how_many_stages_distillation_stopped(page):
    """Its lines are of those that did: of 10-4 one seed, of 10-8-2 none."""
    assert "Distillation stopped in 1 of 2 stages with dskd, at epoch 2." in page.texts
    assert "Distillation stopped in 2 of 2 stages with dskd, at epoch 2, 2." in page.texts
    assert "Distillation never stopped." in page.texts


def test_the_headline_says_of_which_of_several_seeds_it_is(page):
    assert "Of seed 0 alone; the mean of all 2 stands under Learners." in page.texts
    assert "under Learners" not in Page(render(fixture())).text


def test_convergence_says_how_soon_each_step_is_near_its_end_near_sizes_first(page):
    rows = [row for row in page.rows if row and " -> " in row[0] and row[2].startswith("with")]
    assert [row[0] for row in rows[::2]] == [
        "mlp-10 -> mlp-8", "mlp-8 -> mlp-6", "mlp-6 -> mlp-4", "mlp-10 -> mlp-6", "mlp-8 -> mlp-4",
        "mlp-4 -> mlp-2", "mlp-10 -> mlp-4", "mlp-6 -> mlp-2", "mlp-8 -> mlp-2", "mlp-10 -> mlp-2",
    ]  # fmt: skip
    with_stop, without = (row for row in rows if row[0] == "mlp-10 -> mlp-8")
    assert with_stop[1:] == [
        "1.25\u00a0×",
        "with dskd",
        "2",
        "epoch\u00a05",
        "25\u00a0%",
    ]  # 0.94 is the first above 0.935
    assert without[1:] == ["1.25\u00a0×", "without controllers", "2", "epoch\u00a08", "–"]
    assert next(row for row in rows if row[0] == "mlp-4 -> mlp-2")[3] == "8"  # of four chains under two seeds


def test_learners_over_seeds_have_mean_deviation_and_paired_difference(page, made):
    assert page.row("10-8-2 (chosen)")[:2] == ["0, 1", accuracy(made, "10-8-2")]
    values = {s["key"]: s["members"]["student"]["test_accuracy"] for s in made["stages"] if "student" in s["members"]}
    gains = [values[f"10-8-2.{seed}.True"] - values[f"10-2.{seed}.True"] for seed in (0, 1)]
    assert page.row("10-8-2 (chosen)")[-1] == f"{100 * mean(gains):+.2f}\u00a0±\u00a0{100 * stdev(gains):.2f}"
    assert page.row("10-2")[-1] == "–"
    assert page.row("10-8-6-4-2 without dskd")[1] == accuracy(made, "10-8-6-4-2", controlled=False)


def test_choices_have_their_margin_and_say_what_is_noise():
    choices = [
        ("direct", None, None),
        ("clear", 0.021, 0.01),
        ("noise", 0.002, 0.004),
        ("edge", 0.004, 0.004),
        ("tie", 0.0, 0.0),
    ]
    page = Page(
        render({**fixture(), "choices": [dict(zip(("text", "margin", "error"), c, strict=True)) for c in choices]})
    )
    assert page.row("direct") == ["–", "–"]
    assert page.row("clear") == ["+2.10\u00a0±\u00a01.00", "above noise"]
    assert page.row("noise") == ["+0.20\u00a0±\u00a00.40", "within noise"]
    assert page.row("edge")[-1] == "within noise"  # as the terminal says
    assert page.row("tie") == ["+0.00\u00a0±\u00a00.00", "a tie"]


def test_the_cost_table_says_what_sharing_saved_and_how_it_is_counted(page):
    saved = next(row for row in page.rows if row and row[0].startswith("Saved by sharing"))
    assert saved[0] == "Saved by sharing 50 stages"  # 4 x 28 models alone, of which 62 are trained
    assert saved[-1].startswith("What chains would cost")
    assert len(page.row("Sharing, against chain by chain")) == 3
    assert page.row("All stages: 62 trained, 0 reused")


def test_in_a_run_of_many_stages_only_the_chosen_chain_is_drawn_and_the_page_says_so(page, made):
    assert "only those of the chosen chain are drawn; curves.csv has every curve." in page.text
    assert page.texts.count("Monitor accuracy") - 1 == len(made["chain"])  # one more heads a table


def test_many_warnings_and_long_tables_are_folded_and_whole(page):
    result = fixture()
    event = result["stages"][3]["events"][0]
    result["stages"][3]["events"] = [{**event, "reason": f"reason {i}!"} for i in range(41)]
    result["stages"][3]["warnings"] = [f"warning {i}!" for i in range(12)]
    own = Page(render(result))
    assert [text for text in own.texts if re.fullmatch(r"reason \d+!", text)] == [f"reason {i}!" for i in range(41)]
    assert all(any(f"warning {i}!" in text for text in own.texts) for i in range(12))
    assert {"4 more", "Decisions of controllers: 41 rows"} <= set(own.texts)  # two warnings are the fixture's
    assert "Cost of each stage: 64 rows" in page.texts


def test_a_tree_too_deep_to_read_across_goes_down_on_every_page():
    result = searched(seeds=(0,), variants=(True,))
    deep = next(stage for stage in result["stages"] if stage["key"] == "10-8-6-4-2.0.True")
    more = [deep]
    while len(more) < 3:
        more.append(taught(f"more {len(more)}", 2, more[-1], 0, 0.9, stopped=False, controlled=True))
    page = Page(render({**result, "stages": [*result["stages"], *more[1:]]}))
    assert next(value for name, value in page.attributes if name == "class" and "card" in value) == "card tall"
    assert len(labels(page, "mlp-10: ")) == 1
    assert page.texts.count("Monitor accuracy") - 1 == len(result["stages"]) + 2  # few enough to be drawn


def test_a_run_of_one_chain_has_nothing_of_this():
    text = Page(render(fixture())).text
    for heading in ("Choices", "Learners", "Curves of each chain", "Convergence", "Saved by sharing"):
        assert heading not in text


@st.composite
def forests(draw):
    """Nodes that each stand after their parent; accuracies tell them apart."""
    count = draw(st.integers(1, 16))
    parents = [None, *(draw(st.none() | st.integers(0, i - 1)) for i in range(1, count))]
    return [tree.Node("mlp-2", f"node {i}!", p, "no stop", i % 3 == 0) for i, p in enumerate(parents)]


@pytest.mark.parametrize(("draw", "width", "height"), [(tree.across, *tree.BOX), (tree.down, 1, tree.LINE[1])])
def test_no_two_models_of_a_tree_overlap(draw, width, height):
    @settings(max_examples=15)
    @given(forests())
    def check(nodes):
        svg = draw("name", "label", nodes)
        texts = re.findall(r'x="([\d.-]+)" y="([\d.-]+)"[^>]*>node (\d+)!</text>', svg)
        places = [(float(x), float(y)) for x, y, _ in texts]
        assert sorted(int(i) for *_, i in texts) == list(range(len(nodes)))
        for i, (x, y) in enumerate(places):
            assert all(abs(x - u) >= width or abs(y - v) >= height for u, v in places[:i])

    check()
