"""Whatever stops being finite, and wherever: the stage ends, the error says where, and no such weight is in a file."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import RECIPE, make_run

from kdcore.errors import DataError, NumericError
from kdcore.plugins import load_plugins
from kdcore.store import Store
from kdcore.testing.faults import poisoned_batch

STEP = 3
LOSS = """
import kdcore
import torch

@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("bad", Bad)

class Bad(torch.nn.Module):
    needs = frozenset({"logits"})

    class Options(kdcore.Options):
        value: str = "nan"
        where: str = "loss"

    @classmethod
    def build(cls, shapes, options):
        made = cls()
        made.options, made.calls = options, 0
        return made

    def forward(self, student, teacher, batch):
        self.calls += 1
        value = (student.logits - teacher.logits).pow(2).mean()
        if self.calls != 4:
            return value
        bad = float(self.options.value)
        return value * bad if self.options.where == "loss" else value + Odd.apply(student.logits, bad)

class Odd(torch.autograd.Function):
    '''Zero, with a gradient that is not finite.'''

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad, ctx.shape = bad, x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        return torch.full(ctx.shape, ctx.bad), None
"""
MODELS = ({"model": "mlp", "size": 2, "width": 32}, {"model": "cnn", "size": 1, "width": 0.25})
OPTIMIZERS = ("sgd", "adamw")
LOSSES = (("kd", "none"), ("dkd", "class"), ("kd", "instance"), ("dkd", "none"), ("kd", "class"))
WHERES = ("pixel", "teacher", "loss", "gradient", "lr")
STRIKES = [(where, value) for value in ("nan", "inf") for where in WHERES[:-1]]
STRIKES[4:4], STRIKES[9:] = [("lr", "1e9")], [("lr", "1e30")]
SETTINGS = list(product(MODELS, OPTIMIZERS, LOSSES))  # 20; with 7 between two, 10 strikes meet 5 of them each
CASES = [(*strike, *SETTINGS[(7 * n + 3 * turn) % 20]) for turn in range(5) for n, strike in enumerate(STRIKES)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("plugin") / "bad_numbers.py"
    file.write_text(LOSS)
    return load_plugins(files=[file])


def name(case) -> str:
    where, value, model, optimizer, (loss, normalize) = case
    return f"{where}-{value}-{model['model']}-{optimizer}-{loss}-{normalize}"


def few(cases, count: int):
    return [pytest.param(case, id=name(case), marks=[pytest.mark.long] * (n >= count)) for n, case in enumerate(cases)]


def bad_teacher(root: Path, host, recipe, value: str) -> str:
    """A trained teacher's weights with one bad number."""
    make_run(root / "before", recipe=recipe, sets=["train.epochs=1"], host=host).execute()
    tensors = load_file(next(root.glob("before/store/results/*/teacher.safetensors")))
    first = next(tensor for tensor in tensors.values() if tensor.is_floating_point())
    first.view(-1)[0] = float(value)
    save_file(tensors, root / "bad.safetensors")
    return str(root / "bad.safetensors")


def strike(root: Path, host, case) -> tuple[dict, list[str]]:
    """The recipe of a case, and what is set for it."""
    where, value, model, optimizer, (loss, normalize) = case
    recipe = {
        **RECIPE,
        "student": model,
        "objective": [{"loss": "cross_entropy"}, {"loss": loss, "normalize": normalize}],
        "train": {"epochs": 2, "lr": 0.01, "optimizer": optimizer},
        "execute": {"log_every": 2, "checkpoint_seconds": 0.0001},
    }
    if where in ("loss", "gradient"):
        recipe["objective"].append({"loss": "bad", "value": value, "where": where})
    if where == "teacher":
        recipe["teacher"] = {**RECIPE["teacher"], "weights": bad_teacher(root, host, recipe, value)}
    return recipe, [f"train.lr={value}", "train.teacher.lr=0.01"] if where == "lr" else []


@pytest.mark.parametrize("case", few(CASES, len(WHERES)))
def test_what_is_not_finite_ends_the_stage_and_reaches_no_file(tmp_path, host, case):
    where, value = case[:2]
    recipe, sets = strike(tmp_path, host, case)
    run = make_run(tmp_path, recipe=recipe, sets=sets, host=host)
    with ExitStack() as faults:
        if where == "pixel":
            faults.enter_context(poisoned_batch(STEP, float(value)))
        with pytest.raises((NumericError, DataError)) as found:
            run.execute()
    text = str(found.value)
    assert "stage '" in text
    assert "member 'teacher'" in text if where in ("pixel", "teacher") else "member 'student'" in text
    steps = {"pixel": (STEP,), "loss": (STEP,), "gradient": (STEP + 1,), "teacher": (0,), "lr": range(30)}
    assert any(f"step {step}," in text for step in steps[where]), text
    check_files(tmp_path)


def check_files(root: Path) -> None:
    """Every checkpoint verifies, and every weight in a file of the run is finite."""
    store = Store(root / "store", pytest.fail)
    for folder in root.glob("store/unfinished/*"):
        assert store.checkpoint(folder.name) is not None
    for path in [*root.glob("store/**/*.safetensors"), *root.glob("run/*.safetensors")]:
        for key, tensor in load_file(path).items():
            assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), (path, key)


def test_there_are_fifty_cases():
    assert len({name(case) for case in CASES}) == 50


def test_a_stage_with_a_poisoned_batch_goes_on_from_its_last_checkpoint_when_the_batch_is_sound(tmp_path, host):
    sets = ["execute.checkpoint_seconds=0.0001", "execute.log_every=1"]
    make_run(tmp_path / "whole", sets=sets, host=host).execute()
    with poisoned_batch(8), pytest.raises(NumericError, match="step 8"):
        make_run(tmp_path, sets=sets, host=host).execute()
    run = make_run(tmp_path, sets=sets, host=host)
    run.execute()
    assert run.console.kinds("stage_started")[0]["step"] == 8
    student = [(root / "run/student.safetensors").read_bytes() for root in (tmp_path, tmp_path / "whole")]
    assert student[0] == student[1]


def test_logits_that_overflow_under_finite_weights_end_the_stage_with_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.training.evaluate.F.cross_entropy", lambda *a, **k: torch.tensor(float("nan")))
    with pytest.raises(NumericError, match=r"member 'teacher': its cross-entropy on the monitor split is nan"):
        make_run(tmp_path).execute()
