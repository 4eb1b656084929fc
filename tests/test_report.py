"""The report: one file that shows what result.json says, whatever it says."""

import copy
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdcore.errors import StorageError
from kdcore.report import formats, render, write
from kdcore.report.page import lede

FIXTURE = Path(__file__).parent / "fixtures" / "result.json"
FETCHING = {"script", "link", "iframe", "img", "image", "object", "embed", "base", "audio", "video", "source", "form"}
EVIL = '<script>alert("x")</script>&$\\frac{1}$ id="a" style=\'url(//b)\''


class Page(HTMLParser):
    """Tags, ids, references and the cells of every table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.refs, self.attributes = [], [], [], []
        self.rows, self.texts, self._cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [values["id"]] if "id" in values else []
        self.refs += [value for name, value in attrs if name in {"href", "src", "xlink:href", "action", "srcset"}]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
            self._cell = self.rows[-1]

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self._cell = None

    def handle_data(self, data):
        if self.tags[-1:] == ["style"]:
            return
        self.texts.append(data)
        if self._cell is not None:
            self._cell[-1] += data

    def row(self, head):
        return next(row[1:] for row in self.rows if row and row[0] == head)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def saved():
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


@pytest.fixture
def result(saved):
    return copy.deepcopy(saved)


def percent(share):
    return f"{100 * share:.2f}\u00a0%"


def test_the_report_needs_no_network_no_script_and_no_second_file(result, tmp_path):
    write(result, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert not FETCHING & set(page.tags)
    assert page.refs
    assert all(ref.startswith("#") for ref in page.refs)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert len(text) < 200_000


def test_the_same_result_gives_the_same_bytes_in_any_process_and_under_any_matplotlib_settings(result, tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\nsvg.fonttype: path\n")
    code = (
        "import json, sys; from pathlib import Path; from kdcore.report import write\n"
        "write(json.loads(Path(sys.argv[1]).read_text(encoding='utf-8')), Path(sys.argv[2]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path)}
    write(result, tmp_path / "here.html")
    subprocess.run([sys.executable, "-c", code, str(FIXTURE), str(tmp_path / "there.html")], check=True, env=env)
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "there.html").read_bytes()


def test_writing_leaves_matplotlib_and_the_result_as_they_were(result, saved):
    import matplotlib

    before = dict(matplotlib.rcParams)
    render(result)
    assert dict(matplotlib.rcParams) == before
    assert result == saved


def test_importing_the_report_imports_neither_matplotlib_nor_jinja2():
    code = "import sys, kdcore.report; print([m for m in ('matplotlib', 'jinja2', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def poisoned(value):
    """The result with every free text replaced; what the contract gives a meaning keeps it."""
    fixed = {"key", "stage", "member", "selection", "tick", "kind", "target"}
    if isinstance(value, dict):
        return {name: item if name in fixed else poisoned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_every_text_is_escaped(result):
    result = poisoned(result)
    assert EVIL[:15] + "…" in Page(render(result)).text  # the chain
    for stage in result["stages"]:
        stage["environment"] = {EVIL: EVIL}
        stage["flops"] = {EVIL: 1}
        stage["members"] = {**stage["members"], EVIL: {**next(iter(stage["members"].values()))}}
        for entry in (e for member in stage["members"].values() for e in member["curve"]):
            entry[f"share.{EVIL}"] = 0.1
    result["degraded"] = {EVIL: EVIL}
    clean, page = Page(render(result)), render(result)
    assert "<script" not in page.lower()
    assert not FETCHING & set(clean.tags)
    assert all(ref.startswith("#") for ref in clean.refs)
    assert len(clean.ids) == len(set(clean.ids))
    assert clean.text.count(" ".join(EVIL.split())) > 20
    assert EVIL[:13] + "…" in clean.text  # a second learner in each stage makes it a tree


def test_accuracies_in_the_page_equal_the_json(result):
    page = Page(render(result))
    members = [result["student"], result["teacher"], result["control"]]
    expected = {
        "Test accuracy, last (reported)": "test_accuracy",
        "Test accuracy, best on monitor": "test_accuracy_at_best",
        "Monitor accuracy, last": "monitor_accuracy",
        "Monitor accuracy, best": "best_monitor_accuracy",
    }
    for head, key in expected.items():
        assert page.row(head) == [*(percent(member[key]) for member in members), ""]
    for link in result["chain"]:
        stage = next(s for s in result["stages"] if s["key"] == link["stage"])
        assert page.texts.count(percent(stage["members"][link["member"]]["test_accuracy"])) >= 2  # both chain figures
    assert f"mlp-2: {percent(result['student']['test_accuracy'])} test accuracy" in page.texts


def test_the_reported_number_follows_the_selection(result):
    result["protocol"]["selection"] = "best"
    result["student"]["test_accuracy"] = result["student"]["test_accuracy_at_best"]
    page = Page(render(result))
    assert f"mlp-2: {percent(result['student']['test_accuracy_at_best'])} test accuracy" in page.texts
    assert page.row("Test accuracy, best on monitor (reported)")


def test_the_headline_says_what_a_difference_is_within_and_the_protocol_says_the_same(result):
    """Two standard errors of a difference, by hand: 2 sqrt((0.9583 0.0417 + 0.9444 0.0556) / 360) is 0.0321."""
    text = Page(render(result)).text
    assert lede(result) in text
    assert lede(result) == (
        "On 360 test images the student is 1.39 points above its control (labels alone), "
        "which is within two standard errors (±3.21), and 2.78 points below its teacher."
    )
    assert "One test image is 0.28 points." in text
    assert "are ±3.21 points from the control and ±2.44 points from the teacher: a smaller one may be chance." in text


def test_compression_is_teacher_over_student(result):
    page = Page(render(result))
    assert page.row("Parameters") == ["4,810", "93,322", "4,810", "19.4\u00a0×"]
    assert page.row("FLOPs") == ["9.47\u00a0k", "2.67\u00a0M", "9.47\u00a0k", "282\u00a0×"]
    assert page.row("Latency")[-1] == "13.3\u00a0×"


def test_the_protocol_says_selection_splits_and_seed(result):
    text = Page(render(result)).text
    for said in ("1,293 training images", "144 monitor images", "360 test images", "last weights.", "Seed: 0"):
        assert said in text
    assert result["protocol"]["text"] in text


def test_every_warning_is_above_every_number_of_the_result(result):
    text = Page(render(result)).text
    told = [*result["warnings"], *result["degraded"].values(), *result["stages"][3]["warnings"]]
    assert all(text.index(" ".join(said.split())) < text.index("Parameters") for said in told)
    assert "3 warnings" in text


def test_a_stop_is_shown_with_its_reason_on_the_chain_at_the_curves_and_in_the_table(result):
    page = Page(render(result))
    event = result["stages"][3]["events"][1]
    assert "stopped at epoch 12" in page.texts
    assert page.texts.count("stop") == 3  # accuracy, loss, shares
    assert page.text.count(f"Stopped at epoch 12: {event['reason']}.") == 3
    decided = [row for row in page.rows if row[-1] == event["reason"]]
    assert decided == [["cnn-2 -> mlp-2", "12", "240", "dskd", "student.dkd.weight = 0.0", event["reason"]]]


def test_other_decisions_are_no_stop(result):
    stage = result["stages"][3]
    stage["events"][1].update(value=0.5)
    stage["events"].append({**stage["events"][1], "kind": "drop", "target": "control", "value": None})
    assert "Stopped at" not in render(result)


@pytest.mark.parametrize(
    "change", [{"kind": "finish", "target": "", "value": None}, {"kind": "drop", "target": "teacher"}]
)
def test_finish_and_a_dropped_teacher_are_stops(result, change):
    result["stages"][3]["events"][1].update(change)
    assert "Stopped at epoch 12" in render(result)


def test_a_stream_is_shown_in_steps(result):
    stage = result["stages"][3]
    stage.update(tick=20, length=400)
    text = Page(render(result)).text
    assert "stopped at step 240" in text
    assert "(step 240)" in text  # best_tick 12


def test_the_controls_curve_is_drawn_where_it_is_used(result):
    labels = [value for name, value in Page(render(result)).attributes if name == "aria-label"]
    assert any(re.match(r"Monitor accuracy .*student from .*; control from .*stopped at epoch 12", x) for x in labels)
    assert any(re.match(r"Train loss .*student from .*; control from ", x) for x in labels)


def test_shares_are_blank_after_the_stop_on_an_axis_that_spans_the_stage(result):
    figure = render(result).split('aria-label="Gradient share: student')[2].split("</svg>")[0]
    assert {"4", "8", "12", "16", "20"} <= set(re.findall(r">(\d+)</text>", figure))
    bands = re.findall(r'<path id="[^"]*" d="([^"]*)" style="stroke: #ffffff"', figure)
    left, width = map(float, re.search(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', figure).groups())
    assert len(bands) == 2
    for band in bands:
        end = max(float(x) for x in re.findall(r"[ML] ([\d.]+)", band))
        assert end == pytest.approx(left + width * 11 / 19, abs=0.1)  # epoch 12 of 1 to 20


def test_ids_are_unique_and_every_reference_has_its_id(result):
    text = render(result)
    page = Page(text)
    used = {ref[1:] for ref in page.refs} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert len(page.ids) == len(set(page.ids))
    assert used <= set(page.ids)


def test_every_figure_says_what_it_shows_and_every_table_head_has_a_scope(result):
    text = render(result)
    assert all('role="img" aria-label="' in tag for tag in re.findall(r"<svg[^>]*>", text))
    assert all("scope=" in tag for tag in re.findall(r"<th\b[^>]*>", text))


@pytest.mark.parametrize("missing", [("control",), ("teacher",), ("control", "teacher")])
def test_missing_teacher_or_control_is_a_dash(result, missing):
    result.update(dict.fromkeys(missing))
    page = Page(render(result))
    assert page.row("Model").count("–") == len(missing)
    assert page.row("Parameters")[-1] == ("–" if "teacher" in missing else "19.4\u00a0×")


def nulled(value, numbers):
    if isinstance(value, dict):
        kept = {"tick", "ticks", "length", "split_seed", "seed", "seeds", "environment"}
        return {name: item if name in kept else nulled(item, numbers) for name, item in value.items()}
    if isinstance(value, list):
        return [nulled(item, numbers) for item in value]
    return numbers if isinstance(value, int | float) and not isinstance(value, bool) else value


@pytest.mark.parametrize("number", [None, float("nan"), float("inf"), 0])
def test_numbers_that_are_none_nan_infinite_or_zero_survive(result, number):
    recipe = result.pop("recipe")
    page = Page(render({**nulled(result, number), "recipe": recipe}))
    text = re.sub(r"[\w.]+ = \w+", "", page.text).lower()  # a decision shows its value as it is
    assert not re.search(r"\b(nan|inf|none|null)\b", text)


def test_empty_curves_give_no_figures_and_say_so(result):
    for stage in result["stages"]:
        for member in stage["members"].values():
            member["curve"] = []
    page = Page(render(result))
    assert page.tags.count("svg") == 2  # the chain
    assert page.text.count("No curves") == 4


def test_a_chain_too_long_to_read_across_goes_down(result):
    link = result["chain"][1]
    result["chain"][1:1] = [link] * 3
    page = Page(render(result))
    assert next(value for name, value in page.attributes if name == "class" and "card" in value) == "card tall"
    assert page.texts.count("assistant") == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 FLOPs"), (999, "999 FLOPs"), (12_345_678, "12.3 MFLOPs"), (999_600_000, "1 GFLOPs"), (5e12, "5 TFLOPs")],
)
def test_operations_have_a_prefix_that_shows_three_digits(value, text):
    assert formats.flops(value) == text


def test_one_is_no_plural():
    assert [formats.counted(n, "stage") for n in (0, 1, 2, 1000)] == ["0 stages", "1 stage", "2 stages", "1,000 stages"]


def test_an_empty_plan_survives(result):
    result.update(chain=[], stages=[], warnings=[], degraded={}, plugins=[], versions={}, recipe={})
    text = Page(render(result)).text
    assert "No warnings." in text
    assert "No controller decided anything." in text


def test_names_outside_the_font_do_not_warn(result):
    result["stages"][3]["members"]["student"]["model"] = "模型"
    assert "模型" in render(result)


def test_a_failed_write_leaves_the_old_report_and_no_part_of_the_new(result, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(StorageError, match=r"report\.html.*No space left"):
        write(result, target)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert target.read_text() == "old"
