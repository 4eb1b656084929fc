"""kdcore.distill and kdcore.run: own modules and data, in this process, which stays as it was."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from small import RECIPE, weights
from torch import Tensor, nn

import kdcore
from kdcore.errors import Interrupted, KdError, RecipeError
from kdcore.journal import Journal

IMAGES = torch.randn(240, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES[:, 0, :2].mean((1, 2)) > IMAGES[:, 0, 2:].mean((1, 2))).long()
TRAIN, TEST = (IMAGES[:200], LABELS[:200]), (IMAGES[200:], LABELS[200:])
BOTH = {"train": TRAIN, "test": TEST}


class Net(nn.Module):
    def __init__(self, width: int = 4, classes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.scale = 1.0
        self.inner, self.last = nn.Linear(16, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.flatten(1)).relu()) * self.scale


class Tied(nn.Module):
    """An autoencoder's weights, one the transpose of the other, and one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x.flatten(1)).relu()))


def call(root: Path, teacher: Any = None, student: Any = None, **options: Any) -> kdcore.RunResult:
    given = {"epochs": 2, "batch_size": 64, "threads": 1, "quiet": True, "root": root, **options}
    given = {"train": TRAIN, "test": TEST, **given}
    return kdcore.distill(teacher or Net(8), student or Net(4), **given)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def reused(result: kdcore.RunResult) -> list[bool]:
    return [stage["reused"] for stage in result["stages"]]


# ---------------------------------------------------------------- modules


def test_a_given_teacher_is_used_as_it_is(tmp_path):
    result = call(tmp_path)
    assert same(result.teacher(), Net(8))
    assert [(stage["length"], stage["steps"]) for stage in result["stages"]] == [(0, 0), (2, 6)]
    assert not same(result.student(), Net(4))
    assert not result.student().training


def test_a_student_and_its_control_start_from_the_weights_it_holds(tmp_path):
    result = call(tmp_path, lr=1e-12, controllers=[{"name": "dskd"}])
    stages = {stage["name"]: stage["key"] for stage in result["stages"]}
    control = next(key for name, key in stages.items() if name.endswith("on labels"))
    stored = tmp_path / "store" / "results" / control
    from safetensors.torch import load_file

    for state in (result.student().state_dict(), load_file(next(stored.glob("*.safetensors")))):
        assert all(torch.allclose(state[name], tensor) for name, tensor in Net(4).state_dict().items())


def test_a_module_that_says_how_to_be_trained_is_trained_first(tmp_path):
    result = call(tmp_path, teacher_train={"epochs": 3})
    assert [stage["length"] for stage in result["stages"]] == [3, 2]
    assert not same(result.teacher(), Net(8))


def test_models_and_terms_are_those_of_a_recipe_too(tmp_path):
    objective = [{"loss": "cross_entropy"}, {"loss": "dkd", "normalize": "class", "weight": 2.0}]
    result = call(
        tmp_path,
        {"model": "mlp", "size": 1},
        {"model": "mlp", "size": 1},
        objective=objective,
        keep="best",
        optimizer="adamw",
        batch_size="auto",
    )
    assert result["recipe"]["data"]["batch_size"] == 16  # of 180 samples
    assert result["recipe"]["train"]["optimizer"] == {"name": "adamw"}
    assert [term["loss"] for term in result["recipe"]["objective"]] == ["cross_entropy", "dkd"]
    assert isinstance(result.student(), nn.Module)


def test_a_strategy_takes_modules_in_its_options(tmp_path):
    result = call(tmp_path, strategy={"name": "assistants", "assistants": [Net(6)]})
    assert [link["member"] for link in result["chain"]] == ["teacher", "student", "student"]


def test_own_modules_are_never_changed(tmp_path):
    teacher, student = Net(8).eval(), Net(4)
    student.last = teacher.last = nn.Linear(4, 2)  # teacher and student share parameters
    teacher.inner = nn.Linear(16, 4)
    before = [copy.deepcopy(module.state_dict()) for module in (teacher, student)]
    result = call(tmp_path, teacher, student)
    for module, state in zip((teacher, student), before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert (teacher.training, student.training) == (False, True)
    assert same(result.teacher(), teacher)
    assert not same(result.student(), student)
    assert call(tmp_path, student, student)["student"] is not None  # one module as both


def test_tied_weights_stay_tied_through_training_and_a_resume(tmp_path, ctrl_c):
    interrupted = Stop(1)
    slow = {"epochs": 3, "execute": {"checkpoint_seconds": 0}}
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "stopped", Tied(), Tied(), plugins=[interrupted], **slow)
    again, whole = (call(tmp_path / name, Tied(), Tied(), **slow) for name in ("stopped", "whole"))
    student = again.student()
    assert student.first.weight is student.second.weight
    assert same(student, whole.student())
    assert not same(student, Tied())
    assert same(again.teacher(), Tied())


def test_a_students_own_file_is_read_into_its_architecture_and_exported(tmp_path):
    result = call(tmp_path)
    images = IMAGES[:5]
    with torch.no_grad():
        expected = result.student()(images)  # floating images: nothing is normalised
        loaded = kdcore.load_model(result.folder / "student.safetensors", module=Net(4))
        file = result.export(tmp_path / "student.pt2")
        program = torch.export.load(file).module()
        assert torch.equal(loaded(images), expected)
        torch.testing.assert_close(program(images), expected)
    with pytest.raises(RecipeError, match=r"'own/net' was handed over in Python.*load_model\(path, module=\.\.\.\)"):
        kdcore.load_model(result.folder / "student.safetensors")
    with pytest.raises(RecipeError, match="unknown exporter 'onxx'"):
        result.export(tmp_path / "student.onnx", format="onxx")
    with pytest.raises(RecipeError, match=r"'my.py' is a path.*plugin_files"):
        call(tmp_path, plugins=["my.py"])


def test_parameters_that_share_memory_are_refused(tmp_path):
    student = Net(16)
    student.other = nn.Parameter(student.inner.weight.data)
    with pytest.raises(RecipeError, match=r"student=\.\.\.\): two of its parameters share memory"):
        call(tmp_path, student=student)


class Counting(Net):
    """Learns less at every step that it remembers, in a buffer that no weights file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return super().forward(x) / self.count.clamp(min=1)


def test_buffers_that_no_weights_file_holds_outlive_a_resume(tmp_path, ctrl_c):
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "stopped", student=Counting(), epochs=4, plugins=[Stop(2)])
    for name in ("stopped", "whole"):
        call(tmp_path / name, student=Counting(), epochs=4)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


# ---------------------------------------------------------------- keys


def test_the_same_call_trains_nothing_the_second_time(tmp_path):
    assert reused(call(tmp_path)) == [False, False]
    again = call(tmp_path)
    assert reused(again) == [True, True]
    assert again.warnings == call(tmp_path).warnings
    assert len(list(tmp_path.glob("distill-*"))) == 1


def test_a_changed_weight_attribute_or_image_is_trained_again(tmp_path):
    first = call(tmp_path)
    scaled, moved, (images, labels) = Net(4), Net(4), TRAIN
    scaled.scale = 2.0
    moved.last.bias.data += 1
    assert reused(call(tmp_path, student=scaled)) == [True, False]
    assert reused(call(tmp_path, student=moved)) == [True, False]
    assert reused(call(tmp_path, train=(images + 1e-6, labels))) == [False, False]
    assert reused(call(tmp_path)) == [True, True]
    assert call(tmp_path).folder == first.folder
    assert len(list(tmp_path.glob("distill-*"))) == 4


def test_an_uncacheable_module_is_trained_again_and_one_warning_says_why(tmp_path):
    student = Net(4)
    student.inner.register_forward_hook(lambda *_: None)
    results = [call(tmp_path, student=student) for _ in range(2)]
    assert [reused(result) for result in results] == [[False, False], [True, False]]
    about = [text for text in results[1].warnings if text.startswith("student: this Net is not recognised")]
    assert len(about) == 1
    assert about[0].endswith("so nothing that needs it comes from the store: Net.inner has hooks")
    assert same(results[0].student(), results[1].student())
    assert "Net.inner has hooks" in results[1].report.read_text()


# ---------------------------------------------------------------- errors


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LazyLinear(4)


class Uncopyable(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not me")


class Shy(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Dictionary(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class Extra(Net):
    def get_extra_state(self) -> Any:
        return 1


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Net(), IMAGES[:2])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"student": Lazy()},
            r"distill\(student=...\): it has lazy parameters, which have no shape yet. Run one batch",
        ),
        ({"teacher": Uncopyable()}, r"distill\(teacher=...\): it cannot be copied \(TypeError: not me\)"),
        ({"teacher": Shy()}, r"distill\(teacher=...\): its copy has the same parameters"),
        ({"student": traced()}, "torch.jit made it, and its copies cannot be used. Give the module"),
        ({"student": Net(4, 3)}, r"student=...\): it gives \(2, 3\) for 2 images of 2 classes. It must give logits"),
        ({"student": Dictionary()}, "it gives dict for 2 images of 2 classes"),
        ({"teacher": nn.Conv2d(3, 2, 1)}, r"it raises RuntimeError for 2 images \(1, 4, 4\)"),
        ({"student": nn.Flatten()}, "it has no parameters"),
        ({"student": Net().requires_grad_(False)}, "all of its parameters are frozen"),
        ({"student": Extra()}, "'_extra_state' in its state_dict is no tensor"),
        ({"teacher": 3}, r"distill\(teacher=...\): int is no model"),
        ({"teacher": "resnett"}, r"teacher.model: unknown model 'resnett'. Did you mean 'resnet'"),
        ({"epoch": 3}, r"distill\(epoch=...\): unknown argument. Did you mean 'epochs'"),
        ({"batch_size": 0}, r"distill\(batch_size=...\): 0 is below 1. Write a number of samples from 1"),
        ({"epochs": "3"}, r"distill\(epochs=...\): '3' is not a whole number"),
        ({"teacher_train": {"epoch": 3}}, "teacher_train.epoch: unknown key. Did you mean 'epochs'"),
        ({"monitor": 1.5}, r"distill\(monitor=...\): 1.5 is not below 1"),
        ({"objective": [{"loss": "dkdd"}]}, r"objective\[0\].loss: unknown loss 'dkdd'"),
        ({"classes": 1}, "1 classes"),
        ({"jobs": 2}, r"distill\(jobs=...\): unknown argument. Worker processes cannot see"),
        ({"execute": {"jobs": 2}}, "execute.jobs: plugin 'own' was handed over in Python. Worker processes cannot"),
    ],
)
def test_an_error_says_which_argument_and_what_to_write(tmp_path, options, text):
    with pytest.raises(KdError, match=text):
        call(tmp_path, **options)
    assert not list(tmp_path.glob("distill-*"))


# ---------------------------------------------------------------- the caller's process


class Stop:
    """Sends a signal to this process at the end of an epoch."""

    def __init__(self, epoch: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.epoch, self.number, self.times = epoch, number, times

    @kdcore.hookimpl
    def kdcore_epoch_finished(self, epoch: float) -> None:
        if epoch == self.epoch:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.fixture
def ctrl_c():
    """Python's own reaction to Ctrl-C, which a test runner may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_checkpoints_and_the_same_call_goes_on(tmp_path, ctrl_c):
    with pytest.raises(KeyboardInterrupt, match="the same call goes on from there") as stopped:
        call(tmp_path / "stopped", epochs=4, plugins=[Stop(2)])
    assert isinstance(stopped.value.__cause__, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list(tmp_path.glob("stopped/store/unfinished/*/ckpt-*"))
    again, whole = (call(tmp_path / name, epochs=4) for name in ("stopped", "whole"))
    assert [r["step"] for r in Journal(again.folder / "journal.jsonl").of("start")] == [0, 0, 6]
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert same(again.student(), whole.student())


def test_a_second_ctrl_c_ends_at_once(tmp_path, ctrl_c):
    with pytest.raises(KeyboardInterrupt) as stopped:
        call(tmp_path, plugins=[Stop(1, times=2)])
    assert stopped.value.__cause__ is None
    assert not list(tmp_path.glob("store/unfinished/*/ckpt-*"))


def test_sigterm_checkpoints_and_reaches_the_callers_handler(tmp_path):
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        with pytest.raises(Interrupted):
            call(tmp_path, plugins=[Stop(1, signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]
    assert list(tmp_path.glob("store/unfinished/*/ckpt-*"))


def test_it_works_in_a_thread_and_inside_a_running_event_loop(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(call(tmp_path)))
    thread.start()
    thread.join()

    async def cell() -> kdcore.RunResult:
        return call(tmp_path)

    assert reused(asyncio.run(cell())) == [True, True]
    assert same(found[0].student(), call(tmp_path).student())


def process_state() -> list[Any]:
    random_state = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    own = [torch.get_num_threads(), os.getcwd(), mpl.get_backend(), list(warnings.filters), torch.get_default_dtype()]
    return [random_state, handlers, own, torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()]


class Dicey(torch.utils.data.Dataset):
    """Draws from every generator when it is read, and gives the same image."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, number: int) -> Any:
        random.random(), np.random.rand(), torch.rand(())
        return IMAGES[number], LABELS[number]


def test_the_callers_process_is_left_as_it_was(tmp_path):
    before = process_state()
    call(tmp_path, train=Dicey(), threads=2)
    with pytest.raises(RecipeError):
        call(tmp_path, lr=-1.0)
    assert process_state() == before


def test_quiet_prints_nothing_and_else_it_is_the_commands_output(tmp_path, capfd):
    call(tmp_path)
    assert tuple(capfd.readouterr()) == ("", "")
    call(tmp_path, quiet=False)
    out, err = capfd.readouterr()
    assert "from the store" in out
    assert "report.html" in out
    assert err == ""


def test_a_given_teacher_of_bytes_is_told_how_they_are_normalised(tmp_path, capsys):
    data = {name: ((images * 40 + 128).clamp(0, 255).byte(), labels) for name, (images, labels) in BOTH.items()}
    call(tmp_path, quiet=False, **data)
    assert "teacher: gets images normalised by the train split; if it was trained otherwise" in capsys.readouterr().out
    call(tmp_path, quiet=False, mean=0.5, std=0.2, **data)
    assert "normalised" not in capsys.readouterr().out


# ---------------------------------------------------------------- results


def test_a_result_is_its_file_with_its_paths_and_accuracy(tmp_path, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    result = call(tmp_path)
    assert dict(result) == json.loads((result.folder / "result.json").read_bytes())
    assert result.accuracy == result["student"]["test_accuracy"]
    with torch.no_grad():
        right = (result.student()(TEST[0]).argmax(1) == TEST[1]).double().mean().item()
    assert result.accuracy == right
    assert result.report.is_file()
    folder = result.folder.name
    assert repr(result).startswith("RunResult(teacher net-154 ")
    assert repr(result).endswith(f"on 40 test images; {folder}/report.html)")
    page = result._repr_html_()
    assert f'<a href="{folder}/report.html">' in page
    assert "<th>student</th><td>net-78</td>" in page


def test_a_monitor_split_of_its_own_is_reported_as_such(tmp_path):
    result = call(tmp_path, monitor=TEST)
    assert (result["protocol"]["train_images"], result["protocol"]["monitor_share"]) == (200, None)
    assert "that is no part of the training data" in result.report.read_text()


def test_resume_says_that_python_has_to_go_on(tmp_path, cli):
    done = cli("resume", call(tmp_path).folder)
    assert done.code == 2
    assert "its modules and data were handed over in Python. Make the same call" in done.err


# ---------------------------------------------------------------- recipes


def test_run_takes_a_mapping_or_a_file_as_the_command_does(tmp_path, tiny, cli):
    path = tiny()
    result = kdcore.run(path, root=tmp_path, quiet=True)
    assert cli("run", path, "--root", tmp_path).out.count("from the store") == 2
    assert result.folder == next(tmp_path.glob("tiny-*"))
    mapping = kdcore.run(RECIPE, sets=["train.epochs=1"], root=tmp_path, store=tmp_path / "other", quiet=True)
    assert mapping.folder.name.startswith("run-")
    assert mapping.accuracy > 0
    assert same(mapping.student(), mapping.student())
    with pytest.raises(RecipeError, match=r"train\.epoch: unknown key"):
        kdcore.run(RECIPE, sets=["train.epoch=1"], root=tmp_path)


class Squares:
    """A plugin as a notebook defines it."""

    class Loss(nn.Module):
        needs = frozenset({"logits"})
        factor = 1.0

        @classmethod
        def build(cls, shapes: Any, options: Any) -> nn.Module:
            return cls()

        def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
            return self.factor * (student.logits - teacher.logits).square().mean()

    @kdcore.hookimpl
    def kdcore_register(registry):
        registry.loss("squares", Squares.Loss)


def test_a_plugin_may_be_a_class_for_this_call_alone(tmp_path, monkeypatch):
    objective = [{"loss": "cross_entropy"}, {"loss": "squares/squares"}]
    plugins = [Squares]
    assert reused(call(tmp_path, objective=objective, plugins=plugins)) == [False, False]
    assert reused(call(tmp_path, objective=objective, plugins=plugins)) == [True, True]
    monkeypatch.setattr(Squares.Loss, "factor", 2.0)
    assert reused(call(tmp_path, objective=objective, plugins=plugins)) == [True, False]
    with pytest.raises(KdError, match="unknown loss 'squares/squares'"):
        call(tmp_path, objective=objective)
    with pytest.raises(KdError, match=r"'squares' was handed over in Python\. Worker processes cannot"):
        kdcore.run(RECIPE, jobs=2, plugins=[Squares], root=tmp_path, quiet=True)


class Looking:
    @kdcore.hookimpl
    def kdcore_epoch_finished(self, epoch):
        pass


def test_an_observer_changes_no_key_and_runs_beside_worker_processes(tmp_path):
    assert call(tmp_path, plugins=[Looking()]).warnings == call(tmp_path).warnings
    assert reused(call(tmp_path, plugins=[Looking()])) == [True, True]
    assert kdcore.run(RECIPE, jobs=2, plugins=[Looking()], root=tmp_path, quiet=True)["degraded"] == {}


def test_a_hook_under_another_name_counts(tmp_path):
    def plugin(factor: float) -> type:
        class Renamed:
            loss = type("Loss", (Squares.Loss,), {"factor": factor})

            @staticmethod
            @kdcore.hookimpl(specname="kdcore_register")
            def mine(registry, loss=loss):
                registry.loss("squares", loss)

        return Renamed

    objective = [{"loss": "cross_entropy"}, {"loss": "renamed/squares"}]
    results = [call(tmp_path, objective=objective, plugins=[plugin(factor)]) for factor in (1.0, 1.0, 2.0)]
    assert [reused(result) for result in results] == [[False, False], [True, True], [True, False]]


def test_code_that_a_class_names_as_text_counts(tmp_path, monkeypatch):
    file = tmp_path / "elsewhere.py"
    text = "from torch import nn\ndef build(o, d): return nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=True))\n"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    class Named:
        @staticmethod
        @kdcore.hookimpl
        def kdcore_register(registry):
            registry.model("linear", "elsewhere:build", options="kdcore.options:Options")

    def trained() -> list[bool]:
        return reused(call(tmp_path, student={"model": "linear"}, plugins=[Named]))

    assert (trained(), trained()) == ([False, False], [True, True])
    file.write_text(text.replace("bias=True", "bias=False"))
    monkeypatch.delitem(sys.modules, "elsewhere")
    assert trained() == [True, False]


def test_the_file_of_an_own_module_says_that_no_name_builds_it(tmp_path):
    path = call(tmp_path).folder / "student.safetensors"
    with pytest.raises(RecipeError, match=r"'own/net' was handed over in Python: no name builds it again"):
        kdcore.load_model(path)
    with pytest.raises(RecipeError, match=r"teacher.weights: 'own/net' was handed over in Python"):
        call(tmp_path, teacher={"weights": str(path)})


def test_a_broken_plugin_object_is_an_error_of_its_own(tmp_path):
    class Empty:
        pass

    with pytest.raises(kdcore.PluginError, match="plugins: empty: it implements no hook"):
        kdcore.run(RECIPE, plugins=[Empty], root=tmp_path)
