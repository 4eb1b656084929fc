"""One sound thing of each kind, and for every check of the conformance kit one that breaks its promise alone."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdcore
from kdcore import Choice, DataInfo, Field, Options, Outcome, Outputs, RunView, Set, Shapes, Spec, Stage
from kdcore.testing import Subject

COUNT = itertools.count()
SOUND: dict[str, Any] = {}
MUTANTS: dict[str, dict[str, Any]] = {"strategy": {}, "controller": {}, "loss": {}, "model": {}}


def sound(kind: str) -> Callable[[Any], Any]:
    return lambda target: SOUND.setdefault(kind, target)


def breaks(check: str) -> Callable[[type], type]:
    """Registers a subclass of a sound thing as the mutant of a check of its kind."""

    def register(mutant: type) -> type:
        (kind,) = [kind for kind, target in SOUND.items() if issubclass(mutant, target)]
        assert MUTANTS[kind].setdefault(check, mutant) is mutant, f"two mutants for {kind} {check}"
        return mutant

    return register


class NotJson(Options):
    limit: Any = Field(float("inf"), description="no JSON number")


# ---------------------------------------------------------------- strategies


@sound("strategy")
class Search:
    """A teacher, a student, and more of them while ``goes_on`` says so."""

    class Options(Options):
        epochs: int = Field(1, ge=1, description="the number of epochs of every stage, at least 1")

    def plan(self, run: RunView, options: Any):
        self.begin()
        teacher = run.label_only("teacher", run.teacher)
        before = yield teacher
        self.look(before)
        stage = self.changed(run.distilled(run.student, teacher["teacher"]))
        (found,) = yield [stage]
        yield Choice("the student", self.best(stage))
        last, now = before["teacher"].accuracy, found["student"].accuracy
        while self.goes_on(last, now):
            found = yield stage
            last, now = now, found["student"].accuracy
        return self.outcome(run, stage)

    def begin(self) -> None: ...

    def look(self, result: kdcore.Result) -> None: ...

    def changed(self, stage: Stage) -> Stage:
        return stage

    def goes_on(self, last: float, now: float) -> bool:
        return False

    def best(self, stage: Stage) -> kdcore.ResultRef:
        return stage["student"]

    def outcome(self, run: RunView, stage: Stage) -> Any:
        return Outcome(stage["student"])


@breaks("options-survive-json")
class StrategyOptions(Search):
    Options = NotJson


@breaks("ends-on-good-results")
class WhileBetter(Search):
    def goes_on(self, last, now):
        return now > last


@breaks("ends-on-flat-results")
class WhileEqual(Search):
    def goes_on(self, last, now):
        return now == last


@breaks("ends-on-bad-results")
class WhileWorse(Search):
    def goes_on(self, last, now):
        return now < last


@breaks("ends-on-results-without-numbers")
class UntilGood(Search):
    def goes_on(self, last, now):
        return not now >= 0


@breaks("ends-with-a-given-teacher")
class ReadsTheTeachersCurve(Search):
    def look(self, result):
        _ = result["teacher"].curve[-1]["accuracy"]


@breaks("outcome-was-asked-for")
class ReturnsAnother(Search):
    def outcome(self, run, stage):
        return Outcome(replace(stage, length=stage.length + 1)["student"])


@breaks("choices-are-of-what-was-asked-for")
class ChoosesWhatComesNext(Search):
    def best(self, stage):
        return replace(stage, seed=1)["student"]


@breaks("stages-are-json")
class SetsInOptions(Search):
    def changed(self, stage):
        return replace(stage, step=Spec("distill", {"members": {"student"}}))


@breaks("stages-are-sound")
class MisspeltSource(Search):
    def changed(self, stage):
        terms = tuple(replace(term, source=term.source and "techer") for term in stage.members["student"].terms)
        return replace(stage, members={**stage.members, "student": replace(stage.members["student"], terms=terms)})


@breaks("replays")
class CountsInTheModule(Search):
    def changed(self, stage):
        return replace(stage, seed=next(COUNT))


@breaks("draws-no-random-numbers")
class DrawsInPlan(Search):
    def begin(self):
        torch.rand(1)


@breaks("reads-no-clock")
class SeedOfTheYear(Search):
    def changed(self, stage):
        return replace(stage, seed=time.localtime().tm_year)


@breaks("leaves-the-process-alone")
class RemembersInTheClass(Search):
    seen: ClassVar[list[str]] = []

    def begin(self):
        self.seen.append("plan")


# ---------------------------------------------------------------- controllers


@sound("controller")
class Stop:
    """Puts the student on labels alone when it was not above the used result twice."""

    class Options(Options):
        patience: int = Field(2, ge=1, description="a number of ticks from 1")

    needs: ClassVar[Any] = frozenset({"accuracy"})
    knob = "student.kd.weight"

    def __init__(self, options: Any) -> None:
        self.count = 0

    @staticmethod
    def prepare(stage: Stage, run: RunView, options: Any) -> Stage:
        control = run.label_only("control", run.student)
        return replace(stage, uses={**stage.uses, "control": control["control"]})

    def decide(self, view: kdcore.TickView) -> Any:
        self.look(view)
        student, control = view.now("student"), view.now("control")
        if student is None or control is None or student > control:
            return []
        self.count += 1
        return [Set(self.knob, 0.0, self.reason())] if self.count == 2 else []

    def look(self, view: kdcore.TickView) -> None: ...

    def reason(self) -> str:
        return "it was not better twice"

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


@breaks("options-survive-json")
class ControllerOptions(Stop):
    Options = NotJson


@breaks("needs-are-known")
class NeedsWhatNobodyMeasures(Stop):
    needs = frozenset({"accuracy", "kappa"})


@breaks("prepares-a-sound-stage")
class PreparesInPlace(Stop):
    @staticmethod
    def prepare(stage, run, options):
        stage.uses["control"] = run.label_only("control", run.student)["control"]
        return stage


@breaks("gives-decisions")
class GivesText(Stop):
    def decide(self, view):
        return [self.reason()] if view.now("student") is not None else []


@breaks("survives-ticks-without-numbers")
class RoundsTheAccuracy(Stop):
    def look(self, view):
        round(view.now("student"), 2)


@breaks("touches-what-exists")
class MisspeltKnob(Stop):
    knob = "student.kd.wieght"


@breaks("decides-alike")
class CountsReasons(Stop):
    def reason(self):
        return f"reason {next(COUNT)}"


@breaks("state-is-json")
class SetInState(Stop):
    def state_dict(self):
        return {"count": self.count, "seen": {"student"}}


@breaks("goes-on-from-its-state")
class Forgets(Stop):
    def load_state_dict(self, state):
        pass


@breaks("keeps-its-view")
class WritesIntoTheView(Stop):
    def look(self, view):
        view.knobs["seen"] = True


@breaks("reads-what-it-needs")
class ReadsTheLoss(Stop):
    def look(self, view):
        view.now("student", "loss")


@breaks("draws-no-random-numbers")
class DrawsInDecide(Stop):
    def look(self, view):
        random.random()


@breaks("reads-no-clock")
class TellsTheYear(Stop):
    def reason(self):
        return f"enough for {time.strftime('%Y')}"


@breaks("leaves-the-process-alone")
class TellsTheEnvironment(Stop):
    def look(self, view):
        os.environ["KDCORE_MUTANT"] = str(next(COUNT))


# ---------------------------------------------------------------- losses


@sound("loss")
class Hint(nn.Module):
    """KL of logits, and a regression of the teacher's pooled feature."""

    class Options(Options):
        temperature: float = Field(2.0, gt=0, description="a temperature above 0")

    needs: ClassVar[Any] = frozenset({"logits", "taps"})

    def __init__(self, shapes: Shapes, options: Any) -> None:
        super().__init__()
        self.temperature = getattr(options, "temperature", 2.0)
        self.width = shapes.teacher["pooled"][0]
        self.adapter = nn.Linear(shapes.student["pooled"][0], self.width)
        self.prepare()

    @classmethod
    def taps(cls, options: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("pooled",), ("pooled",)

    @classmethod
    def build(cls, shapes: Shapes, options: Any) -> Hint:
        return cls(shapes, options)

    def prepare(self) -> None: ...

    def forward(self, student: Outputs, teacher: Outputs, batch: kdcore.Batch) -> Any:
        self.look(batch)
        own, other = self.widened(student.logits), self.widened(teacher.logits).detach()
        feature, wanted = self.widened(student.taps["pooled"]), self.widened(teacher.taps["pooled"]).detach()
        return self.end(self.logits(own, other) + self.features(feature, wanted))

    def widened(self, tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    def look(self, batch: kdcore.Batch) -> None: ...

    def end(self, loss: Tensor) -> Any:
        return loss.mean()

    def logits(self, own: Tensor, other: Tensor) -> Tensor:
        """[B]."""
        return self.divergence(self.log_softmax(own / self.temperature), F.log_softmax(other / self.temperature, 1))

    def log_softmax(self, logits: Tensor) -> Tensor:
        return F.log_softmax(logits, 1)

    def divergence(self, own: Tensor, other: Tensor) -> Tensor:
        return F.kl_div(own, other, log_target=True, reduction="none").sum(1)

    def features(self, own: Tensor, other: Tensor) -> Tensor:
        """[B]."""
        return (self.adapter(own) - other).pow(2).mean(1)


@breaks("options-survive-json")
class LossOptions(Hint):
    Options = NotJson
    limit = float("inf")


@breaks("needs-what-it-says")
class ReadsTheLabels(Hint):
    def look(self, batch):
        batch.target.sum()


@breaks("gives-a-scalar")
class GivesAVector(Hint):
    def end(self, loss):
        return loss.mean(0, keepdim=True)


@breaks("teaches-the-student")
class IdleAdapter(Hint):
    def prepare(self):
        self.idle = nn.Linear(2, 2)


@breaks("means-over-the-batch")
class SumsOverTheBatch(Hint):
    def end(self, loss):
        return loss.sum()


@breaks("minds-no-order")
class CountsOddRowsTwice(Hint):
    def features(self, own, other):
        return super().features(own, other) * (1 + torch.arange(len(own), device=own.device) % 2)


@breaks("takes-small-batches")
class NormalisesOverTheBatch(Hint):
    def features(self, own, other):
        return super().features((own - own.mean(0)) / own.std(0, correction=0), other)


@breaks("gradcheck")
class StopsAGradient(Hint):
    def end(self, loss):
        return (loss * loss.detach()).mean()


@breaks("shift-invariant")
class ComparesRawLogits(Hint):
    def logits(self, own, other):
        return ((own - other) / self.temperature).pow(2).mean(1)


@breaks("finite-at-1e4")
class DividesExponentials(Hint):
    def log_softmax(self, logits):
        return logits - logits.exp().sum(1, keepdim=True).log()


@breaks("takes-half-precision")
class StaysNarrow(Hint):
    def widened(self, tensor):
        return tensor


@breaks("follows-its-device")
class KeepsATensor(Hint):
    def prepare(self):
        self.scale = torch.ones(self.width)

    def features(self, own, other):
        return super().features(own, other * self.scale)


@breaks("teacher-gets-no-gradient")
class TeachesTheTeacher(Hint):
    def forward(self, student, teacher, batch):
        return super().forward(student, teacher, batch) + 0 * teacher.taps["pooled"].float().mean()


@breaks("keeps-its-inputs")
class WritesIntoTheBatch(Hint):
    def look(self, batch):
        batch.inputs.add_(1)


@breaks("compiles")
class BreaksTheGraph(Hint):
    def look(self, batch):
        torch._dynamo.graph_break()


@breaks("state-survives-safetensors")
class HidesState(Hint):
    def prepare(self):
        self.register_buffer("centre", torch.randn(self.width), persistent=False)

    def features(self, own, other):
        return super().features(own, other - self.centre)


@breaks("knobs-take-effect")
class KeepsTheSquare(Hint):
    def prepare(self):
        self.square = self.temperature**2

    def end(self, loss):
        return loss.mean() * self.square


# ---------------------------------------------------------------- models


@sound("model")
class Net(nn.Module):
    """A convolution, batch norm, dropout and a linear layer."""

    class Options(Options):
        width: int = Field(4, ge=1, description="the number of channels, at least 1")

    taps: ClassVar[dict[str, str]] = {"pooled": "pool"}

    def __init__(self, options: Any, data: DataInfo) -> None:
        super().__init__()
        width = getattr(options, "width", 4)
        self.first = nn.Sequential(nn.Conv2d(data.shape[0], width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, self.classes(data))
        self.prepare(data)

    def classes(self, data: DataInfo) -> int:
        return data.classes

    def prepare(self, data: DataInfo) -> None: ...

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.changed(self.pool(self.first(images)))))

    def changed(self, features: Tensor) -> Tensor:
        """[B, width]."""
        return features


@breaks("options-survive-json")
class ModelOptions(Net):
    Options = NotJson


@breaks("follows-the-classes")
class SevenClasses(Net):
    def classes(self, data):
        return 7


@breaks("takes-other-images")
class SquareImages(Net):
    def forward(self, images):
        return super().forward(images.reshape(len(images), 3, 16, 16))


@breaks("starts-from-the-seed")
class ScaledByChance(Net):
    def prepare(self, data):
        self.head.weight.data.mul_(random.random())


@breaks("survives-safetensors")
class HidesAWeight(Net):
    def prepare(self, data):
        self.scale = torch.rand(())

    def changed(self, features):
        return features * self.scale


@breaks("copies-are-alike")
class HoldsItself(Net):
    def prepare(self, data):
        self.run = lambda images: self.head(self.drop(self.pool(self.first(images))))

    def forward(self, images):
        return self.run(images)


@breaks("evaluates-alike")
class CountsImages(Net):
    def prepare(self, data):
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def changed(self, features):
        self.seen += len(features)
        return features


@breaks("minds-no-company")
class CentresTheBatch(Net):
    def changed(self, features):
        return features - features.mean(0)


@breaks("keeps-its-images")
class RectifiesInPlace(Net):
    def forward(self, images):
        return super().forward(images.relu_())


@breaks("taps-are-tensors")
class TapsNothing(Net):
    taps: ClassVar = {"pooled": "head.pool"}


@breaks("all-parameters-learn")
class DeadWeight(Net):
    def prepare(self, data):
        self.dead = nn.Parameter(torch.rand(3, 3))


@breaks("takes-autocast")
class MixesTypes(Net):
    def changed(self, features):
        rows = torch.arange(len(features))
        return torch.zeros(features.shape).index_add(0, rows, features @ torch.eye(features.shape[1]))


# ---------------------------------------------------------------- plugins

PLUGIN = """
{first}
import kdcore

@kdcore.hookimpl
def kdcore_register(registry):
    registry.strategy("still", Still)
    {more}

class Still:
    class Options(kdcore.Options):
        rounds: int = kdcore.Field(1{description})

    def plan(self, run, options):
        stage = run.label_only("teacher", run.teacher)
        yield stage
        return kdcore.Outcome(stage["teacher"])
"""
DESCRIBED = ', description="a number of rounds"'
PLUGINS: dict[str, dict[str, str]] = {
    "imports-no-torch": {"first": "import torch"},
    "prints-nothing": {"first": "print('hello')"},
    "leaves-the-environment": {"first": "import os\nos.environ['KDCORE_MUTANT'] = str(os.getpid())"},
    "leaves-random-numbers": {"first": "import random\nrandom.random()"},
    "starts-nothing": {
        "first": "import threading\nthreading.Thread(target=lambda: __import__('time').sleep(1)).start()"
    },
    "registers-alike": {"first": "N = []", "more": "N.append(registry.strategy(f'still-{len(N)}', Still))"},
    "targets-load": {"more": "registry.strategy('gone', f'{__name__}:Gone')"},
    "options-are-described": {"description": ""},
    "uses-public-names": {"first": "from kdcore.codec import digest"},
}


def plugin_source(check: str = "") -> str:
    """The sound plugin, or the mutant of a check."""
    return PLUGIN.format(**{"first": "", "more": "", "description": DESCRIBED, **PLUGINS.get(check, {})})


def subject(kind: str, check: str) -> Subject:
    """The mutant of a check that is not of plugins."""
    return Subject(kind, "mutant", MUTANTS[kind][check])
