"""benchmarks/table_dskd.py: its claims by their rules, its page by its JSON, its JSON by its runs."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import table_dskd  # noqa: E402
from dskd_claims import HELD, NOT_HELD, NOT_TESTABLE, claims  # noqa: E402
from dskd_figures import columns  # noqa: E402
from dskd_runs import Bench, execute, units  # noqa: E402
from dskd_table import page  # noqa: E402
from tables import pretty, spread  # noqa: E402

TINY = """
threads = 1
data = { name = "digits", batch_size = 256 }
teacher = { model = "mlp", size = 6, width = 8 }
student = { model = "mlp", size = 2, width = 8 }
train = { epochs = 1, lr = 0.1 }
objective = [{ loss = "cross_entropy", weight = 0.1 }, { loss = "kd", weight = 0.9 }]
controller = [{ name = "dskd", patience = 1 }]

[strategy]
name = "search"
mode = "exhaustive"
candidates = [
    { model = "mlp", size = 3, width = 8 }, { model = "mlp", size = 4, width = 8 },
    { model = "mlp", size = 5, width = 8 },
]
baseline = true
"""
MODELS = ("mlp-10", "mlp-8", "mlp-6", "mlp-4", "mlp-2")
NOISE = (-0.05, 0.0, 0.08)


# ---------------------------------------------------------------- made-up figures


def made(
    gain: float = 4.0,
    best: str = "10-4-2",
    *,
    stops: tuple[int, int] = (8, 15),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 30,
    models: Sequence[str] = MODELS,
    collapsed: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A run in which DSKD is ``gain`` above KD and the best chain another point; ``stops`` are (near, far)."""
    run: dict[str, Any] = {
        "name": "main", "run": "made-0", "finished": "2030-01-01T00:00:00Z", "wall_seconds": 60.0, "jobs": 2,
        "tag": "0" * 8, "warnings": [], "choices": [], "chosen": best, "evidence": {},
        "versions": {"kdcore": "1", "torch": "2", "python": "3"}, "trained": {"starts": 1, "stages": 1, "seconds": 1.0},
        "environment": {"processor": "p", "machine": "m", "device": "cpu", "threads": 1},
        "protocol": {
            "data": {"name": "mnist", "batch_size": 128, "split_seed": 0}, "models": list(models), "baseline": True,
            "teacher": {"model": "mlp", "size": 10, "width": 64},
            "images": {"train": 9, "monitor": 1, "test": 1}, "selection": "last", "seeds": list(seeds),
            "train": {"epochs": epochs, "lr": 0.1, "teacher": {"lr": 0.05}, "optimizer": {"name": "sgd"},
                      "schedule": {"name": "cosine"}},
            "objective": [{"loss": "cross_entropy", "weight": 0.1}], "controller": [{"name": "dskd", "patience": 3}],
        },
        "costs": {"stages_shared": 1, "stages_stopped": 1, "overhead": 1.2, "clock": 0.9,
                  **{role: {"flops": 1, "seconds": 1.0} for role in
                     ("students", "teachers", "controls", "first_teachers", "stopping", "sharing", "guided")},
                  "plain_alone": {"flops": 4, "seconds": 2.0}},
        "labels": [], "chains": [],
    }  # fmt: skip
    for seed in seeds:
        for role, model, accuracy in (("teacher", models[0], 97.2), ("control", models[-1], 97.6)):
            run["labels"].append({"role": role, "model": model, **_row(accuracy + NOISE[seed], seed)})
        for chain in columns(run):
            kd = 90 + NOISE[seed]
            dskd = kd + (collapsed or {}).get(chain, gain + (chain == best) + NOISE[seed])
            near = chain.split("-")[-2:] in (["4", "2"], ["8", "6"])
            stop = stops[0] if near else stops[1]
            run["chains"].append({"chain": chain, "variant": "KD", "stop": None, "epochs": epochs, **_row(kd, seed)})
            run["chains"].append(
                {"chain": chain, "variant": "DSKD", "stop": stop, "epochs": epochs, **_row(dskd, seed)}
            )
    return run


def _row(accuracy: float, seed: int) -> dict[str, Any]:
    measured = dict.fromkeys(("test", "test_at_best", "monitor", "best_monitor"), accuracy / 100)
    return {"seed": seed, "key": f"{accuracy}{seed}", **measured, "seconds": 1.0, "flops": 10, "params": 5}


def content(**runs: Any) -> dict[str, Any]:
    """The table's JSON of these parts."""
    parts = {part: [{**run, "name": part}] for part, run in runs.items()}
    missing = [part for part in table_dskd.PARTS if part not in parts]
    return {"data": "mnist", "commands": ["python"], "missing": missing, "parts": parts}


def verdicts(found: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(number, verdict) of every finding on MNIST."""
    own = [claim for claim in claims(found) if not claim.text.startswith(("CIFAR", "SVHN"))]
    return [(claim.number, verdict) for claim in own for _, _, verdict in claim.findings]


def test_claims_that_the_figures_show_are_held() -> None:
    assert verdicts(content(main=made())) == [
        (1, HELD), (2, HELD), (3, HELD), (3, HELD), (4, NOT_TESTABLE), (5, HELD)
    ]  # fmt: skip


def test_claims_that_the_figures_do_not_show_are_not_held() -> None:
    found = made(gain=-1.0, best="10-8-6-2", stops=(25, 5))
    assert verdicts(content(main=found)) == [
        (1, NOT_HELD), (2, NOT_HELD), (3, NOT_HELD), (3, NOT_HELD), (4, NOT_TESTABLE), (5, NOT_HELD)
    ]  # fmt: skip


def test_a_claim_is_not_held_because_nothing_speaks_against_it() -> None:
    """No chain is better than another, in an interval of more than a point."""
    found = made(best="", collapsed={"10-8-6-2": 4.0})
    for row in found["chains"]:
        row["test"] += 0.004 * ((row["seed"] + len(row["chain"])) % 3) * (row["variant"] == "DSKD")
    assert [verdict for number, verdict in verdicts(content(main=found)) if number in (1, 5)] == [NOT_HELD, NOT_HELD]


def test_a_small_gain_is_a_gain_but_not_the_claimed_one() -> None:
    assert [verdict for number, verdict in verdicts(content(main=made(gain=0.5))) if number == 3] == [NOT_HELD, HELD]


def test_one_seed_holds_no_claim_that_needs_an_interval() -> None:
    found = dict(verdicts(content(main=made(seeds=(0,)))))
    assert [found[number] for number in (1, 3, 5)] == [NOT_TESTABLE] * 3


@pytest.mark.parametrize(("later", "verdict"), [(-0.2, HELD), (-8.0, NOT_HELD)])
def test_a_chain_that_collapsed_recovers_if_longer_training_brings_it_back(later: float, verdict: str) -> None:
    main = made(collapsed={"10-4-2": -19.0})
    long = made(models=("mlp-10", "mlp-8", "mlp-4", "mlp-2"), epochs=200, collapsed={"10-4-2": later})
    assert [v for number, v in verdicts(content(main=main, long=long)) if number == 4] == [verdict, NOT_TESTABLE]


def test_other_data_sets_are_not_testable_here() -> None:
    others = [claim for claim in claims(content(main=made())) if claim.text.startswith(("CIFAR", "SVHN"))]
    assert {verdict for claim in others for _, _, verdict in claim.findings} == {NOT_TESTABLE}


def test_the_page_names_what_did_not_run() -> None:
    text = page(content(main=made()))
    assert "Not run, or not finished: alpha, k, strong, long, greedy." in text
    assert "The teacher mlp-10 is weaker than its student: " in text
    assert "a difference of -0.40 [-0.40, -0.40] points. " in text
    assert ", 1 thread a stage; " in text
    assert "Nothing has run yet" in page(content())


def test_the_page_says_which_teacher_stands_beside() -> None:
    text = page(content(main=made(), strong=made(models=("mlp-3", *MODELS[1:]))))
    assert "30 epochs; the first teacher: model mlp, size 10, width 64, lr 0.05." in text
    assert "| 3-2 | 3-8-2 |" in text


def test_the_page_judges_the_clock_against_plain_chains_that_share_and_that_do_not() -> None:
    text = page(content(main=made()))
    assert "plain chains share their stages too | 0.900 | met |" in text
    assert "each plain chain trains all its models | 0.500 | met |" in text
    assert "| 1.200 | 0.900 | 0.250 | 0.500 |" in text


def test_the_page_says_what_may_be_chance_and_begins_each_goal_with_a_capital() -> None:
    run = made()
    for row in run["labels"]:
        row["test"] += 0.004 * (row["seed"] - 1) * (row["role"] == "teacher")
    text = page(content(main=run, greedy=made()))
    assert re.search(r"a difference of -0\.40 \[.*\] points, which may be chance\.", text)
    goals = text.partition("| goal | measured |")[2].partition("##")[0].splitlines()[2:]
    assert all(line[2].isupper() for line in goals if line)


def test_the_page_has_the_published_numbers_beside_ours() -> None:
    text = page(content(main=made(), alpha=made()))
    assert "| DSKD, published | 97.62 | 97.44 | 97.31 | 78.02 | 87.68 | 97.68 | 97.68 | - |" in text
    assert "DSKD on 10-4-2 is 78.02 in the paper and 95.02 here." in text


hundredths = st.integers(-10_000, 10_000).map(lambda n: n / 100)  # of nearly equal floats scipy warns


@given(st.lists(hundredths, min_size=2, max_size=9, unique=True))
def test_intervals_are_those_of_students_t(values: list[float]) -> None:
    found, known = spread(values), ttest_1samp(values, 0).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(known.low), pytest.approx(known.high))


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=9
    )
)
def test_the_json_reads_back_as_it_was(value: Any) -> None:
    assert json.loads(pretty(value)) == value


# ---------------------------------------------------------------- a small whole run


class Whole:
    """Parts main and greedy of a tiny recipe: killed by Ctrl-C in its midst, then run again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(TINY)
        (folder / "out").mkdir()
        self.bench = Bench("digits", self.recipe, folder / "runs", seeds=1)

    def __call__(self, *arguments: str) -> int:
        places = ("--recipe", self.recipe, "--runs", self.folder / "runs", "--out", self.folder / "out")
        return table_dskd.main(["digits", *map(str, places), "--seeds", "1", "--jobs", "1", *arguments])

    def kill(self) -> None:
        """Ctrl-C as soon as three stages are stored."""
        done = threading.Event()

        def wait() -> None:
            while not done.wait(0.002):
                if len(list((self.folder / "runs" / "store" / "results").glob("*"))) >= 3:
                    os.kill(os.getpid(), signal.SIGINT)
                    return

        watch = threading.Thread(target=wait)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        watch.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                self("--parts", "main", "greedy")
        finally:
            done.set()
            watch.join()
            signal.signal(signal.SIGINT, before)

    @property
    def json(self) -> Path:
        return self.folder / "out" / "dskd-digits.json"

    @property
    def page(self) -> Path:
        return self.folder / "out" / "dskd-digits.md"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    made = Whole(tmp_path_factory.mktemp("table"))
    made.kill()
    assert not made.json.exists()
    assert made("--parts", "main", "greedy") == 0
    return made


def test_a_killed_run_goes_on_and_trains_no_finished_stage_again(whole: Whole) -> None:
    main, greedy = (json.loads(whole.json.read_text())["parts"][part][0] for part in ("main", "greedy"))
    assert len({row["key"] for row in (*main["labels"], *main["chains"])}) == 35
    assert main["trained"]["stages"] <= main["trained"]["starts"] <= 35 + 1
    assert greedy["trained"]["starts"] == 0


def test_a_whole_run_says_its_goals_its_protocol_and_no_folder_of_this_machine(whole: Whole) -> None:
    text = whole.page.read_text()
    assert re.search(r"16 stages a seed, not 28; \d+ starts of 35 stages in its journal \| met", text)
    assert f"Protocol `{json.loads(whole.json.read_text())['parts']['main'][0]['tag']}`: digits, 1295 training" in text
    assert str(whole.folder) not in text + whole.json.read_text()


def test_running_it_again_trains_nothing_and_changes_nothing(whole: Whole) -> None:
    def stored() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole.folder.glob("runs/store/results/*/*")}

    before, results = whole.page.read_text(), stored()
    assert whole("--parts", "main", "greedy") == 0
    assert stored() == results
    assert whole.page.read_text() == before


def test_the_plan_counts_what_is_still_to_train(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    assert whole("--plan", "--parts", "main", "alpha", "k", "long") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {" ".join(line[:-3]): line[-3:-1] for line in lines}
    assert counts["main"] == ["35", "0"]
    assert counts["alpha"] == ["35", "30"]
    assert counts["K = 3"] == ["20", "15"]
    assert counts["long"] == ["18", "18"]


def test_no_run_begins_when_the_time_is_up(whole: Whole) -> None:
    unit = units(whole.bench, "alpha")[0]
    assert execute(unit, whole.bench, time.monotonic()) is None
    assert whole("--parts", "alpha", "--budget-minutes", "0") == 3


def test_check_is_content_with_what_the_runs_say(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    assert whole("--check") == 0
    assert "what its runs and their store say" in capsys.readouterr().out


def test_check_without_a_table_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "table_dskd.py", "svhn", "--check", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    expected = f"{tmp_path / 'dskd-svhn.json'}: there is no table to check. Train it: leave out --check."
    assert done.stderr.strip() == expected


def test_check_finds_an_edited_figure(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    before = whole.json.read_text()
    edited = copy.deepcopy(json.loads(before))
    edited["parts"]["main"][0]["chains"][3]["test"] += 0.001
    whole.json.write_text(pretty(edited) + "\n")
    try:
        assert whole("--check") == 1
    finally:
        whole.json.write_text(before)
    out = capsys.readouterr().out
    assert "table.parts.main.0.chains.3.test" in out
    assert "dskd-digits.md is not what dskd-digits.json gives" in out


def test_check_finds_a_stage_that_the_store_lost(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    lost = next((whole.folder / "runs" / "store" / "results").glob("*"))
    shutil.move(lost, whole.folder / "lost")
    try:
        assert whole("--check") == 1
    finally:
        shutil.move(whole.folder / "lost", lost)
    assert f"{lost.name[:12]}: not in the store" in capsys.readouterr().out


@pytest.mark.parametrize("measure", ["seconds", "member_seconds"])
def test_check_finds_times_in_a_run_that_its_store_does_not_have(
    whole: Whole, measure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole.folder / "runs" / json.loads(whole.json.read_text())["parts"]["main"][0]["run"] / "result.json"
    before = path.read_text()
    edited = json.loads(before)
    stage = edited["stages"][0]
    stage[measure] = 0.5 * stage[measure] if measure == "seconds" else dict.fromkeys(stage[measure], 0.0)
    path.write_text(json.dumps(edited))
    try:
        assert whole("--check") == 1
    finally:
        path.write_text(before)
    assert f"{stage['key'][:12]}: the store says something else" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("dskd-*.json")), ids=lambda path: path.stem)
def test_the_committed_page_is_what_the_committed_json_gives(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert pretty(json.loads(text)) + "\n" == text
    assert page(json.loads(text)) == path.with_suffix(".md").read_text(encoding="utf-8")
