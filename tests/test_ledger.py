"""The ledger of gradients says what autograd says, and training does not notice it."""

from __future__ import annotations

import json

import pytest
import torch
from small import RECIPE, die_at_step_30, file_hash, make_run
from torch import nn

from kdcore.data import Batch
from kdcore.errors import RecipeError
from kdcore.losses.options import KDOptions
from kdcore.losses.terms import KD, CrossEntropy
from kdcore.outputs import Outputs
from kdcore.plan import Term
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load
from kdcore.training.ledger import entries
from kdcore.training.member import LiveTerm

STUDENT, TEACHER = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
BATCH = Batch(torch.zeros(6, 1, 2, 2), torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(6), 0)
OTHERS = {"teacher": Outputs(TEACHER)}


def live(module, weight=1.0, name="", loss="kd"):
    source = None if isinstance(module, CrossEntropy) else "teacher"
    return LiveTerm(Term(loss, source, weight, name=name), module, KDOptions, lambda epoch, warm: 1.0, source, weight)


def test_norms_and_cosines_are_those_of_autograd():
    terms = [live(CrossEntropy(), 2.0, loss="cross_entropy"), live(KD(temperature=3.0), 0.5)]
    found = entries(terms, Outputs(STUDENT.clone().requires_grad_()), OTHERS, BATCH)
    gradients = []
    for weight, value in (
        (2.0, lambda s: nn.functional.cross_entropy(s, BATCH.target)),
        (
            0.5,
            lambda s: 9 / 6 * nn.functional.kl_div((s / 3).log_softmax(1), (TEACHER / 3).softmax(1), reduction="sum"),
        ),
    ):
        leaf = STUDENT.clone().requires_grad_()
        gradients.append(weight * torch.autograd.grad(value(leaf), leaf)[0].flatten())
    a, b = gradients
    assert list(found) == ["norm.cross_entropy", "norm.kd", "cosine.cross_entropy.kd"]
    expected = [a.norm(), b.norm(), nn.functional.cosine_similarity(a, b, dim=0)]
    assert [value.item() for value in found.values()] == pytest.approx([v.item() for v in expected], rel=1e-5)


def test_a_term_points_where_it_points_whatever_its_weight():
    terms = [live(KD(), 1.0, "a"), live(KD(), 3.0, "b"), live(KD(temperature=1e3), 3.0, "soft")]
    found = entries(terms, Outputs(STUDENT), OTHERS, BATCH)
    assert found["cosine.a.b"].item() == pytest.approx(1, abs=1e-12)
    assert found["norm.b"].item() == pytest.approx(3 * found["norm.a"].item())
    assert -1 <= found["cosine.a.soft"].item() < 1


def test_a_gradient_of_nothing_has_a_norm_of_zero_and_no_direction():
    found = entries([live(KD(), 1.0, "a"), live(KD(), 1.0, "b")], Outputs(TEACHER.clone()), OTHERS, BATCH)
    assert found["norm.a"].item() == pytest.approx(0, abs=1e-6)
    assert all(torch.isfinite(value) for value in found.values())


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_norms_of_a_batch_in_pieces_are_those_of_the_whole(pieces):
    def of(copies, share=1.0):
        terms = [live(CrossEntropy(), 2.0, loss="cross_entropy"), live(KD(), 0.5)]
        batch = Batch(BATCH.inputs, BATCH.target.repeat(copies), BATCH.index.repeat(copies), 0)
        others = {"teacher": Outputs(TEACHER.repeat(copies, 1))}
        found = entries(terms, Outputs(STUDENT.repeat(copies, 1)), others, batch, share)
        return {name: value.item() for name, value in found.items()}

    assert of(1, 1 / pieces) == pytest.approx(of(pieces), rel=1e-5)  # every piece is the same, as is their mean


class Moody(nn.Module):
    """A loss with state, which draws random numbers."""

    needs = frozenset({"logits"})

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, student, teacher, batch):
        self.calls += 1
        self.seen += 1
        return (student.logits * torch.rand(5)).mean()


def test_state_gradients_and_random_numbers_stay():
    module, logits = Moody(), STUDENT.clone().requires_grad_()
    before = torch.get_rng_state()
    entries([live(module), live(KD(), name="b")], Outputs(logits), OTHERS, BATCH)
    assert (module.calls, module.seen.item(), logits.grad) == (0, 0, None)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- in a run

PLUGIN = """
import kdcore
import torch
from torch import nn

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("hint", Hint)
    registry.loss("noise", Noise)

class Hint(nn.Module):
    needs = frozenset({"taps"})

    @staticmethod
    def taps(options):
        return ("pooled",), ("pooled",)

    @classmethod
    def build(cls, shapes, options):
        made = cls()
        made.map = nn.Linear(shapes.student["pooled"][0], shapes.teacher["pooled"][0])
        return made

    def forward(self, student, teacher, batch):
        return (self.map(student.taps["pooled"]) - teacher.taps["pooled"]).pow(2).mean()

class Noise(nn.Module):
    needs = frozenset({"logits"})

    @classmethod
    def build(cls, shapes, options):
        made = cls()
        made.register_buffer("mean", torch.zeros(shapes.classes))
        return made

    def forward(self, student, teacher, batch):
        self.mean.lerp_(student.logits.detach().mean(0), 0.1)
        return ((student.logits - self.mean) * torch.rand(len(self.mean))).pow(2).mean()
"""
OBJECTIVE = [
    {"loss": "cross_entropy"},
    {"loss": "kd", "weight": 2.0},
    {"loss": "hint"},
    {"loss": "noise", "weight": 0.1},
]
TABLE = {**RECIPE, "student": {"model": "mlp", "size": 2, "width": 16}, "objective": OBJECTIVE}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same recipe without and with a ledger."""
    root = tmp_path_factory.mktemp("ledger")
    (root / "beside.py").write_text(PLUGIN)
    host = load_plugins(files=[root / "beside.py"])
    found = {}
    for name, every in (("off", 0), ("on", 3)):
        made = make_run(root, recipe=TABLE, sets=[f"train.ledger={every}"], host=host, name=name)
        found[name] = (root / name, made.execute(), made.console)
    return found


def student(result):
    return result["stages"][-1]["members"]["student"]


def test_training_does_not_notice_a_ledger(runs):
    (off, before, _), (on, after, _) = runs.values()
    assert file_hash(off / "student.safetensors") == file_hash(on / "student.safetensors")
    assert before["stages"][-1]["flops"] == after["stages"][-1]["flops"]
    rows = [{k: v for k, v in row.items() if "norm." not in k and "train.cosine." not in k}
            for row in student(after)["curve"]]  # fmt: skip
    assert rows == student(before)["curve"]


def test_curves_and_metrics_hold_norms_and_cosines_of_terms_that_act_through_the_logits(runs):
    folder, result, _ = runs["on"]
    expected = {"norm.cross_entropy", "norm.kd", "norm.noise"}
    expected |= {"cosine.cross_entropy.kd", "cosine.cross_entropy.noise", "cosine.kd.noise"}
    for row in student(result)["curve"]:
        found = {k.removeprefix("train.") for k in row if k.startswith(("train.norm.", "train.cosine."))}
        assert found == expected
        assert row["train.norm.kd"] > 0
        assert -1 <= row["train.cosine.cross_entropy.kd"] <= 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line["values"] for line in lines if line["kind"] == "log" and line["member"] == "student"]
    assert any(expected <= set(values) for values in logged)
    assert '"norm.' not in (runs["off"][0] / "metrics.jsonl").read_text()


def test_a_ledger_goes_on_after_a_kill(tmp_path):
    sets = ["train.ledger=4", "train.epochs=4", "execute.checkpoint_seconds=0"]
    die_at_step_30(make_run(tmp_path / "killed", sets=sets))
    whole, killed = (make_run(tmp_path / folder, sets=sets).execute() for folder in ("whole", "killed"))
    assert student(whole)["curve"] == student(killed)["curve"]


def test_the_report_draws_them_and_names_what_is_not_there(runs):
    page = (runs["on"][0] / "report.html").read_text()
    assert "Gradient norms: student" in page
    assert "Gradient cosines: student" in page
    assert "Not through the logits alone, so not here: hint." in page
    assert "Gradient norms" not in (runs["off"][0] / "report.html").read_text()


def test_only_distilled_stages_have_a_ledger_and_its_default_is_no_part_of_a_key(runs):
    (_, before, _), (_, after, _) = runs.values()
    assert before["stages"][0]["key"] == after["stages"][0]["key"]
    assert before["stages"][-1]["key"] != after["stages"][-1]["key"]
    plain, off = (compile_recipe(load(RECIPE, sets), load_plugins().catalog)[0] for sets in ([], ["train.ledger=0"]))
    stages = [v.distilled(v.student, v.label_only("teacher", v.teacher)["teacher"]) for v in (plain, off)]
    assert stages[0].identity == stages[1].identity


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (["train.ledger=-1"], r"train.ledger: -1 is below 0"),
        (["train.teacher.ledger=3"], r"train.teacher.ledger: unknown key. It counts for every stage"),
    ],
)
def test_a_ledger_that_makes_no_sense_is_refused(sets, text):
    with pytest.raises(RecipeError, match=text):
        compile_recipe(load(RECIPE, sets), load_plugins().catalog)
