"""What the project ships keeps every promise that the conformance kit checks, and so do unusual things."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import ClassVar
from unittest import SkipTest

import pytest
import torch
import torch.nn.functional as F
from mutants import SOUND, plugin_source, subject
from small import PROOFS
from torch import nn

import kdcore
from kdcore.finding import load_file
from kdcore.testing import Subject, checks_of, parametrize_with_checks, subjects_of, verdicts
from kdcore.testing.subject import Check, require

FEW = {"mlp", "cnn", "resnet", "squeezenet1_1", "shufflenet_v2_x0_5"}
SHIPPED = [
    one
    for plugin in (
        "assistants",
        "core",
        "distill",
        "dskd",
        "earlystop",
        "features",
        "gradient",
        "plateau",
        "search",
        "vision",
    )
    for one in subjects_of(plugin)
    if one.kind != "model" or one.name in FEW
]


@parametrize_with_checks(*SHIPPED)
def test_what_the_project_ships_conforms(check):
    check()


@pytest.mark.parametrize("name", ["kd", "dkd"])
@pytest.mark.parametrize("normalize", ["class", "instance"])
def test_losses_conform_under_every_normalisation(name, normalize):
    (plain,) = [s for s in subjects_of("core") if s.name == name]
    options = plain.entry.options_class()(normalize=normalize)
    failed = [v for v in verdicts(Subject("loss", name, plain.target, options)) if v.state == "failed"]
    assert not failed


# ---------------------------------------------------------------- losses of every sort


class Relations(nn.Module):
    """Distances between samples, as relational distillation compares them: no mean over samples, no logits."""

    needs: ClassVar = frozenset({"taps"})
    mean_over_batch = False

    @staticmethod
    def taps(options):
        return ("stage1", "pooled"), ("stage3", "pooled")

    @classmethod
    def build(cls, shapes, options):
        return cls()

    def forward(self, student, teacher, batch):
        own, other = ([self.relations(tap.flatten(1)) for tap in side.taps.values()] for side in (student, teacher))
        return {f"level{i}": F.smooth_l1_loss(a, b.detach()) for i, (a, b) in enumerate(zip(own, other, strict=True))}

    def relations(self, features):
        features = F.normalize(features if features.dtype == torch.float64 else features.float())
        return features @ features.T


class Same(nn.Module):
    """Compares features as they are, so that both sides need one shape; only vectors."""

    needs: ClassVar = frozenset({"taps"})

    @staticmethod
    def taps(options):
        return ("stage1",), ("stage1",)

    @classmethod
    def build(cls, shapes, options):
        assert shapes.student == shapes.teacher
        assert len(shapes.student["stage1"]) == 1
        return cls()

    def forward(self, student, teacher, batch):
        a, b = student.taps["stage1"], teacher.taps["stage1"].detach()
        return F.mse_loss(a.double(), b.double()).to(torch.promote_types(a.dtype, torch.float32))


class Tokens(nn.Module):
    """Compares how tokens [T, D] of a transformer relate to each other."""

    needs: ClassVar = frozenset({"taps"})

    @staticmethod
    def taps(options):
        return ("block",), ("block",)

    @classmethod
    def build(cls, shapes, options):
        assert len(shapes.student["block"]) == 2
        return cls()

    def forward(self, student, teacher, batch):
        own, other = (self.relations(side.taps["block"]) for side in (student, teacher))
        return F.mse_loss(own, other.detach())

    def relations(self, tokens):
        tokens = F.normalize(tokens if tokens.dtype == torch.float64 else tokens.float(), dim=2)
        return tokens @ tokens.transpose(1, 2)


class Memory(nn.Module):
    """Remembers each sample's logits of the last epoch (self-distillation on labels alone), by its index."""

    class Options(kdcore.Options):
        on_labels: ClassVar[bool] = True
        momentum: float = kdcore.Field(0.9, ge=0, lt=1, description="a share from 0 to below 1")

    needs: ClassVar = frozenset({"logits", "target", "index"})

    def __init__(self, shapes, options):
        super().__init__()
        self.momentum = options.momentum
        self.register_buffer("bank", torch.zeros(shapes.samples, shapes.classes))

    @classmethod
    def build(cls, shapes, options):
        return cls(shapes, options)

    def forward(self, student, teacher, batch):
        assert teacher is None
        logits = student.logits if student.logits.dtype == torch.float64 else student.logits.float()
        wanted = self.momentum * self.bank[batch.index] + (1 - self.momentum) * F.one_hot(batch.target, logits.shape[1])
        self.bank[batch.index] = logits.softmax(1).detach().to(self.bank.dtype)
        return -(wanted * F.log_softmax(logits, 1)).sum(1).mean()


class Masked(nn.Module):
    """Hides a random part of each sample's map, as masked generative distillation does, behind an adapter."""

    needs: ClassVar = frozenset({"taps"})

    def __init__(self, own, other):
        super().__init__()
        self.adapter = nn.Conv2d(own, other, 3, padding=1)

    @staticmethod
    def taps(options):
        return ("stage1",), ("stage1",)

    @classmethod
    def build(cls, shapes, options):
        return cls(shapes.student["stage1"][0], shapes.teacher["stage1"][0])

    def forward(self, student, teacher, batch):
        own, other = (side.taps["stage1"].to(self.adapter.weight.dtype) for side in (student, teacher))
        shown = torch.rand(len(own), 1, *own.shape[2:], device=own.device) < 0.5
        return F.mse_loss(self.adapter(own * shown), other.detach())


class Learned(nn.Module):
    """A temperature that is trained; its option is where it starts."""

    needs: ClassVar = frozenset({"logits"})
    fixed: ClassVar = frozenset({"start"})

    class Options(kdcore.Options):
        start: float = kdcore.Field(4.0, gt=0, description="the first temperature")

    def __init__(self, start):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(start).log())

    @classmethod
    def build(cls, shapes, options):
        return cls(options.start)

    def forward(self, student, teacher, batch):
        own, other = (
            F.log_softmax(side.logits.to(torch.promote_types(side.logits.dtype, torch.float32)) / t, 1)
            for side, t in ((student, self.log_temperature.exp()), (teacher, 4.0))
        )
        return F.kl_div(own, other.detach(), log_target=True, reduction="batchmean")


SORTS = (Relations, Same, Tokens, Memory, Masked, Learned)


@parametrize_with_checks(*(Subject("loss", loss.__name__, loss) for loss in SORTS))
def test_losses_of_other_sorts_conform(check):
    check()


def test_without_a_gpu_the_device_of_a_loss_whose_shapes_depend_on_values_is_left_open():
    class Confident(SOUND["loss"]):
        def logits(self, own, other):
            sure = other.softmax(1).amax(1) > 0.2
            return super().logits(own[sure], other[sure]).sum() / len(own)

    found = {v.check.name: v.state for v in verdicts(Subject("loss", "confident", Confident))}
    assert found["follows-its-device"] == ("passed" if torch.cuda.is_available() else "skipped")
    assert {name for name, state in found.items() if state == "failed"} == set()


def test_an_error_says_the_line_of_the_loss_and_how_to_repair_it():
    narrow = subject("loss", "takes-half-precision")
    (reason,) = [v.reason for v in verdicts(narrow) if v.state == "failed"]
    assert re.search(r"same dtype.*mutants\.py line \d+\. Convert at the start", reason)


# ---------------------------------------------------------------- unusual plugins


@pytest.fixture(scope="module")
def proofs():
    yield subjects_of(load_file(PROOFS))
    sys.modules.pop("proofs", None)


def test_strategies_and_controllers_of_streams_swaps_and_two_players_conform(proofs):
    found = {f"{s}-{v.check.name}": v for s in proofs if s.kind in ("strategy", "controller") for v in verdicts(s)}
    # these two assert that they see numbers, since that is what they prove
    meant = {f"controller-{name}-survives-ticks-without-numbers" for name in ("harder", "swap")}
    assert {name: v.reason for name, v in found.items() if v.state == "failed"}.keys() == meant
    assert found["controller-swap-goes-on-from-its-state"].state == "passed"


def test_a_single_file_may_import_torch_for_only_runs_that_name_it_import_it(proofs):
    found = {v.check.name: v.state for v in verdicts(proofs[0]) if v.state != "passed"}
    assert found == {"imports-no-torch": "skipped"}


def test_a_plugin_that_seeds_numpy_when_it_is_imported_is_told(plugin_file):
    source = plugin_source().replace("import kdcore", "import kdcore\nimport numpy\nnumpy.random.seed(0)")
    (failed,) = [v for v in verdicts(subjects_of(load_file(plugin_file("seeds", source)))[0]) if v.state == "failed"]
    assert failed.check.name == "leaves-random-numbers"


# ---------------------------------------------------------------- the kit itself


def test_a_subject_without_an_example_of_required_options_says_what_to_give():
    class Sized(SOUND["strategy"]):
        class Options(kdcore.Options):
            size: int = kdcore.Field(ge=1, description="a number from 1")

    with pytest.raises(AssertionError, match=r"strategy sized\.size: missing.*ClassVar `example`"):
        Subject("strategy", "sized", Sized).example()
    Sized.Options.example = {"size": 2}
    assert Subject("strategy", "sized", Sized).example().size == 2


def test_a_plugin_that_is_not_installed_is_an_error_with_a_suggestion():
    with pytest.raises(kdcore.PluginError, match=r"no plugin 'asistants' is installed\. Did you mean 'assistants'"):
        subjects_of("asistants")


def test_a_check_turns_any_error_into_a_failure_with_its_place_and_keeps_skips():
    def stumbles(subject):
        raise KeyError("lost")

    def skips(subject):
        raise SkipTest("no taps")

    with pytest.raises(AssertionError, match=r"it raised KeyError: 'lost', .*test_testing.py line"):
        Check("loss", "x", "", stumbles)(SHIPPED[0])
    with pytest.raises(SkipTest, match="no taps"):
        Check("loss", "x", "", skips)(SHIPPED[0])
    with pytest.raises(AssertionError, match=r"^it is broken\. Mend it\.$"):
        require(False, "it is broken", "Mend it.")


def test_every_check_says_its_promise_and_why():
    for kind in ("strategy", "controller", "loss", "model", "plugin"):
        for check in checks_of(Subject(kind, "any", None)):
            assert 20 < len(check.about) < 120, check.name
            _, _, why = check.body.__doc__.partition("\n\n")
            assert why.strip(), f"{check.name} does not say why"


def test_tests_have_readable_names():
    decorator = parametrize_with_checks("distill").mark
    names = [decorator.kwargs["ids"](case) for case in decorator.args[1]]
    assert "strategy-distill-replays" in names
    assert "plugin-distill-imports-no-torch" in names


def test_the_kit_imports_neither_torch_nor_pytest_nor_hypothesis():
    code = (
        "import sys; from kdcore.testing import subjects_of, verdicts\n"
        "assert all(v.state == 'passed' for s in subjects_of('distill') for v in verdicts(s))\n"
        "assert not {'torch', 'pytest', 'hypothesis'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
