"""Checks that a plugin's author runs in his own tests. Each raises AssertionError with what is wrong.

::

    from kdcore.testing import check_loss, check_model, check_strategy

    def test_my_strategy():
        check_strategy(BornAgain)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..codec import canonical, digest, encode
from ..options import Options
from ..plan import MemberResult, ModelRef, OptimizerSpec, Outcome, Result, RunView, SourceSpec, Spec, Stage, Term

__all__ = ["check_loss", "check_model", "check_strategy", "run_view"]

LONGEST = 200
SCRIPTS: Mapping[str, Callable[[int], float]] = {
    "rising": lambda n: min(0.5 + 0.01 * n, 0.99),
    "flat": lambda n: 0.5,
    "falling": lambda n: max(0.9 - 0.01 * n, 0.1),
}


def run_view(**changes: Any) -> RunView:
    """A run as a strategy sees it, without data or models behind it; ``changes`` replace fields."""
    view = RunView(
        seed=0,
        teacher=ModelRef("cnn", {"size": 3}),
        student=ModelRef("mlp", {"size": 1}),
        objective=(Term("cross_entropy", None), Term("kd")),
        labels=(Term("cross_entropy", None),),
        optimizer=OptimizerSpec(),
        data=SourceSpec(Spec("digits")),
        epochs=3,
        model=lambda table: ModelRef(table["model"], {k: v for k, v in table.items() if k != "model"}),
    )
    return dataclasses.replace(view, **changes)


def check_strategy(strategy: type, options: Options | None = None, view: RunView | None = None) -> None:
    """A strategy ends with an Outcome whatever the results, and asks for the same stages when it is replayed.

    Args:
        strategy: the class.
        options: its options; default: ``strategy.Options()``.
        view: the run that it plans; default: :func:`run_view`.
    """
    options = options if options is not None else strategy.Options()  # type: ignore[attr-defined]
    view = view or run_view()
    assert canonical(options.model_dump(mode="json")), "options are not JSON"
    for name, script in SCRIPTS.items():
        asked, outcome = _drive(strategy, options, view, script)
        again, _ = _drive(strategy, options, view, script)
        assert asked == again, f"under {name} results a replay asks for other stages"
        assert isinstance(outcome, Outcome), f"under {name} results it returns {outcome!r}, not an Outcome"
        assert outcome.student.member in _stage(outcome).members, "the outcome's student is no member of its stage"


def _drive(strategy: type, options: Options, view: RunView, script: Callable[[int], float]) -> tuple[list[str], Any]:
    plan, answer, asked = strategy().plan(view, options), None, list[str]()
    while len(asked) < LONGEST:
        try:
            wanted = plan.send(answer)
        except StopIteration as end:
            return asked, end.value
        stages = wanted if isinstance(wanted, list) else [wanted]
        results = []
        for stage in stages:
            asked.append(_identity(stage))
            results.append(_scripted(stage, script(len(asked))))
        answer = results if isinstance(wanted, list) else results[0]
    raise AssertionError(f"more than {LONGEST} stages: does it end?")


def _identity(stage: Stage) -> str:
    return digest(encode(stage, _identity))


def _scripted(stage: Stage, accuracy: float) -> Result:
    row = {"accuracy": accuracy, "loss": 1 - accuracy}
    members = {
        name: MemberResult(stage[name], accuracy, accuracy, (row,) * stage.length, 1000, 1000) for name in stage.members
    }
    return Result(stage, _identity(stage), members, (), 1.0, 1000)


def _stage(outcome: Outcome) -> Stage:
    assert isinstance(outcome.student.stage, Stage), "the outcome's student refers to no stage"
    return outcome.student.stage


def check_loss(loss: type, options: Options | None = None, *, classes: int = 7, batch: int = 6) -> None:
    """A loss on logits gives a finite 0-d tensor, a gradient to the student alone, and minds no order of samples.

    Args:
        loss: the class; its ``needs`` are within {"logits", "target"}.
        options: its options; default: ``loss.Options()``, or none.
        classes: C of the random logits.
        batch: B of them.
    """
    import torch

    from ..data import Batch
    from ..outputs import Outputs, Shapes

    module = loss.build(Shapes(classes, 100), options or getattr(loss, "Options", Options)())  # type: ignore[attr-defined]
    assert module.needs <= {"logits", "target"}, f"needs {sorted(module.needs)}; this check covers logits and target"
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e4):
        student = (torch.randn(batch, classes, generator=generator) * scale).requires_grad_()
        teacher = (torch.randn(batch, classes, generator=generator) * scale).requires_grad_()
        target = torch.randint(classes, (batch,), generator=generator)
        index = torch.arange(batch)

        def value(order: torch.Tensor) -> torch.Tensor:
            given = Batch(torch.zeros(batch, 1, 1, 1), target[order], index[order], 0)
            found = module(Outputs(student[order]), Outputs(teacher[order].detach()), given)
            return torch.stack(list(found.values())).sum() if isinstance(found, dict) else found

        found = value(index)
        assert found.ndim == 0, f"it gives shape {tuple(found.shape)}, not a scalar"
        assert torch.isfinite(found), f"it is {found.item()} for logits of scale {scale:g}"
        found.backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None, "the student gets no gradient"
        assert torch.isfinite(student.grad).all(), f"the gradient is not finite for logits of scale {scale:g}"
        assert teacher.grad is None, "the teacher gets a gradient"
        torch.testing.assert_close(value(index.flip(0)), found, rtol=1e-4, atol=1e-5, msg="the order of samples counts")


def check_model(build: Callable[..., Any], options: Options | None = None, *, classes: int = 7) -> None:
    """A model gives [B, classes], is deterministic in evaluation, survives safetensors, and its taps exist.

    Args:
        build: what was registered: ``build(options, data)``.
        options: its options; default: none.
        classes: number of classes asked for.
    """
    import torch
    from safetensors.torch import load, save

    from ..data import DataInfo
    from ..training.member import host_state

    info = DataInfo((3, 16, 16), classes)
    options = options or Options()
    module = build(options, info).eval()
    images = torch.randn(2, *info.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = module(images)
        assert tuple(first.shape) == (2, classes), f"it gives {tuple(first.shape)} for 2 images of {classes} classes"
        assert torch.equal(first, module(images)), "evaluation is not deterministic"
        twin = build(options, info).eval()
        twin.load_state_dict(load(save(host_state(module))))
        assert torch.equal(first, twin(images)), "its weights do not survive safetensors"
    for name, path in getattr(module, "taps", {}).items():
        assert path in dict(module.named_modules()), f"tap {name!r} names no submodule: {path!r}"
