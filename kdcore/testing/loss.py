"""Checks of losses, on made-up logits, taps and labels.

Some promises are not for every loss. One that does not make them says so by an attribute of its class or module:

- ``shift_invariant = False``: adding a constant to all logits of a sample changes it (it compares raw logits);
- ``mean_over_batch = False``: a sample counts for more in a batch of others (it compares samples with each other);
- ``exact_gradient = False``: its gradient is not that of its value (it stops the gradient somewhere);
- ``fixed = frozenset({"start"})``: options that ``build`` alone reads, e.g. a first value; no knob turns them.

One that draws random numbers in ``forward``, such as a mask for each sample, gives other values for samples in other
places: the two checks that move samples do not apply to it. The framework seeds torch for every step.

A loss for a step of its own, such as a generator's, which has its gradient from the teacher, is no subject of these
checks: leave it out of what :func:`~kdcore.testing.parametrize_with_checks` gets.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import SkipTest

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..options import Options
from ..outputs import Outputs
from . import purity
from .made_up import ROWS, Given, Made, draws, gradients, seeded, total, value
from .subject import Subject, advising, check, require

KNOWN = frozenset({"logits", "taps", "index", "target"})


def made(subject: Subject) -> Made:
    """The loss, built, with inputs for it."""
    return Made.of(subject.load(), subject.example(), subject.catalog)


def _close(found: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-6) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=rtol, atol=atol)


def _promising(subject: Subject, promise: str) -> Made:
    loss = made(subject)
    if not getattr(loss.module, promise, True):
        raise SkipTest(f"it declares {promise} = False")
    return loss


def _given_to_move(loss: Made) -> Given:
    given = loss.given()
    if draws(loss.module, given):
        raise SkipTest("it draws random numbers, which samples get by their place in the batch")
    return given


@check
def options_survive_json(subject: Subject) -> None:
    """Its options are JSON from which the same options are read back.

    A stage holds them so.
    """
    purity.options_survive_json(subject)


@check
def needs_what_it_says(subject: Subject) -> None:
    """Its ``needs`` are within logits, taps, index and target, and it works with these alone.

    What is not named may be missing: unlabelled data has no target.
    """
    loss = made(subject)
    fix = f"Write needs = frozenset({{...}}) with some of {', '.join(sorted(KNOWN))}."
    require(loss.loss.needs <= KNOWN, f"its needs are {set(loss.loss.needs)}", fix)
    given = loss.given()
    missing: dict[str, Any] = {name: None for name in ("target", "index") if name not in loss.loss.needs}
    bare = replace(given, batch=replace(given.batch, **missing))
    try:
        value(loss.module, bare)
    except Exception as error:
        problem = f"without {' and '.join(missing)} it raises {type(error).__name__}: {error}"
        raise AssertionError(f"{problem}. Name in needs what it reads.") from error


@check
def gives_a_scalar(subject: Subject) -> None:
    """It gives a 0-d floating tensor, or a dict of such.

    Terms are weighted and summed.
    """
    loss = made(subject)
    given = loss.given()
    found = loss.module(given.student, given.teacher, given.batch)
    for part in found.values() if isinstance(found, dict) else [found]:
        shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        fix = "Return the mean over the batch."
        require(isinstance(part, Tensor) and part.ndim == 0 and part.is_floating_point(), f"it gives {shape}", fix)


@check
def teaches_the_student(subject: Subject) -> None:
    """The student's logits or taps get a gradient, and so do all adapters.

    A term without a gradient, e.g. behind a ``detach``, trains nothing and says nothing.
    """
    loss = made(subject)
    given = loss.given()
    adapters = dict(loss.module.named_parameters())
    parameters = [p for p in adapters.values() if p.requires_grad]
    found = total(loss.module(given.student, given.teacher, given.batch))
    require(found.requires_grad, "the student gets no gradient", "Do not detach the student's outputs.")
    leaves = given.leaves()
    grads = torch.autograd.grad(found, [*leaves, *parameters], allow_unused=True)
    reached = any(g is not None and g.abs().max() > 0 for g in grads[: len(leaves)])
    require(reached, "the student gets no gradient", "Do not detach the student's outputs.")
    idle = [n for n, g in zip(adapters, grads[len(leaves) :], strict=False) if g is None]
    require(not idle, f"adapter {', '.join(idle)} gets no gradient", "Use it in forward, or leave it out.")


@check
def means_over_the_batch(subject: Subject) -> None:
    """A batch with every sample twice gives the same value.

    Weights and learning rates then do not depend on the batch size.
    """
    loss = _promising(subject, "mean_over_batch")
    given = _given_to_move(loss)
    twice = value(loss.module, given.take(torch.arange(ROWS).repeat(2)))
    once = value(loss.module, given)
    fix = "Average over samples, or declare mean_over_batch = False."
    require(_close(twice, once), f"it is {once.item():g}, with every sample twice {twice.item():g}", fix)


@check
def minds_no_order(subject: Subject) -> None:
    """Samples in another order give the same value.

    Batches are shuffled.
    """
    loss = made(subject)
    given = _given_to_move(loss)
    turned = value(loss.module, given.take(torch.arange(ROWS).roll(1)))
    once = value(loss.module, given)
    require(_close(turned, once), f"it is {once.item():g}, in another order {turned.item():g}", "Treat samples alike.")


@check
def takes_small_batches(subject: Subject) -> None:
    """It is finite for one sample, or for ``min_batch`` of them if the module says so.

    The last batch of an epoch may have one; with ``min_batch`` the recipe is refused before training.
    """
    loss = made(subject)
    rows = getattr(loss.module, "min_batch", 1)
    found = value(loss.module, loss.given().take(torch.arange(rows)))
    fix = "Give the module an attribute min_batch, the smallest number that it takes."
    require(torch.isfinite(found), f"for a batch of {rows} it is {found.item()}", fix)


@check
def gradcheck(subject: Subject) -> None:
    """In float64 its gradient is that of its value.

    Checked by differences, for logits and taps of the student.
    """
    loss = _promising(subject, "exact_gradient")
    given = loss.given(dtype=torch.float64)
    module = loss.again().double()
    names = list(given.student.taps)

    def function(logits: Tensor, *taps: Tensor) -> Tensor:
        return value(module, replace(given, student=Outputs(logits, dict(zip(names, taps, strict=True)))))

    try:
        torch.autograd.gradcheck(function, given.leaves(), fast_mode=True)
    except RuntimeError as error:
        fix = "Keep float64 in float64, repair backward(), or declare exact_gradient = False."
        raise AssertionError(f"{str(error).strip().splitlines()[0].rstrip('.,')}. {fix}") from None


@check
def shift_invariant(subject: Subject) -> None:
    """Adding a constant to all logits of a sample changes nothing.

    Logits are defined up to such a constant.
    """
    loss = _promising(subject, "shift_invariant")
    given = loss.given()
    shift = torch.arange(ROWS)[:, None] - 2.5
    moved = replace(given, student=replace(given.student, logits=given.student.logits + shift))
    if given.teacher is not None:
        moved = replace(moved, teacher=replace(given.teacher, logits=given.teacher.logits - shift))
    once, other = value(loss.module, given), value(loss.module, moved)
    fix = "Compare softmax or log_softmax, or declare shift_invariant = False."
    require(_close(other, once), f"it is {once.item():g}, with shifted logits {other.item():g}", fix)


@check
def finite_at_1e4(subject: Subject) -> None:
    """Value and gradient are finite for outputs of scale 10,000.

    Untrained and diverging models give such; one NaN ends a run.
    """
    loss = made(subject)
    given = loss.given(scale=1e4)
    found = value(loss.module, given)
    fix = "Use log_softmax and logsumexp rather than exp, log and a division."
    require(torch.isfinite(found), f"it is {found.item()}", fix)
    for grad in gradients(loss.module, given):
        require(grad is None or torch.isfinite(grad).all(), "its gradient is not finite", fix)


@check
def takes_half_precision(subject: Subject) -> None:
    """It takes outputs in bfloat16 and float16, near its value in float32, with gradients of their dtype.

    Under ``precision = "bf16"`` models give such, while adapters stay in float32.
    """
    loss = made(subject)
    exact = value(loss.module, loss.given().map(Tensor.detach))
    fix = "Convert at the start, unless it is float64: student.logits.float(), student.taps[name].float()."
    for dtype in (torch.bfloat16, torch.float16):
        given = loss.given(dtype=dtype)
        with advising(fix):
            found = value(loss.module, given)
        near = math.isclose(found.item(), exact.item(), rel_tol=0.05, abs_tol=0.02)
        require(near, f"in {dtype} it is {found.item():g}, in float32 {exact.item():g}", fix)
        grads = gradients(loss.module, given)
        finite = all(g is None or (g.dtype == dtype and torch.isfinite(g).all()) for g in grads)
        require(finite, f"in {dtype} its gradient is not finite", fix)


@check
def follows_its_device(subject: Subject) -> None:
    """Moved by ``.to(device)``, it works on that device alone.

    The framework moves modules so; a tensor that is neither parameter nor buffer stays behind. Without a GPU the
    device is torch's ``meta``, which knows shapes and devices, but no values.
    """
    device = "cuda" if torch.cuda.is_available() else "meta"
    loss = made(subject)
    fix = "Use register_buffer for tensors, and device=student.logits.device where one is made in forward."
    try:
        found = value(loss.again().to(device), loss.given().to(device))
    except Exception as error:
        if isinstance(error, NotImplementedError) or "meta tensors" in str(error):
            raise SkipTest(f"only a GPU can tell: {str(error).splitlines()[0]}") from None
        raise AssertionError(f"moved to {device} it fails: {str(error).splitlines()[0].rstrip('.!')}. {fix}") from error
    require(found.device.type == device, f"moved to {device} it gives a value on {found.device}", fix)


@check
def teacher_gets_no_gradient(subject: Subject) -> None:
    """The teacher's outputs get no gradient, unless the module's ``teacher_grad`` is set.

    The framework sets ``teacher_grad`` where a term's ``through`` asks for the path through its source; a loss that
    cannot give it has no such attribute.
    """
    loss = made(subject)
    if loss.given().teacher is None:
        raise SkipTest("it is a loss on labels alone")
    given = loss.given().map_teacher(Tensor.requires_grad_)
    reached = any(g is not None for g in gradients(loss.module, given, teacher=True))
    fix = "Detach the teacher's outputs, unless the module's own attribute teacher_grad (False at first) is set."
    require(not reached, "the teacher gets a gradient", fix)
    if hasattr(loss.module, "teacher_grad"):
        loss.module.teacher_grad = True  # type: ignore[assignment]
        reached = any(g is not None for g in gradients(loss.module, given, teacher=True))
        require(reached, "with teacher_grad = True the teacher gets no gradient", "Detach unless it is set.")


@check
def keeps_its_inputs(subject: Subject) -> None:
    """It changes neither outputs nor batch.

    Other terms and members use the same tensors.
    """
    loss = made(subject)
    given = loss.given().map(Tensor.detach)
    batch = given.batch
    inputs = [*given.leaves(), *given.leaves(teacher=True), batch.inputs, batch.target, batch.index]
    before = [tensor.clone() for tensor in inputs]
    value(loss.module, given)
    same = all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    require(same, "it changes a tensor that it is given", "Use no in-place operation on inputs.")


@check
def compiles(subject: Subject) -> None:
    """torch.compile takes it as one graph, which gives the same value.

    A graph break costs the speed that compiling a training step is for.
    """
    loss = made(subject)
    given = loss.given()
    expected = value(loss.module, given)
    torch._dynamo.reset()
    compiled = torch.compile(loss.again(), fullgraph=True, backend="eager")
    try:
        with seeded():
            found = total(compiled(given.student, given.teacher, given.batch))
    except torch._dynamo.exc.TorchDynamoException as error:
        fix = "Use tensor operations without .item(), print and data-dependent branches."
        raise AssertionError(f"it is not one graph: {str(error).strip().splitlines()[0]}. {fix}") from None
    finally:
        torch._dynamo.reset()
    what = f"it is {expected.item():g}, compiled {found.item():g}"
    require(_close(found, expected), what, "Branch on options alone.")


@check
def state_survives_safetensors(subject: Subject) -> None:
    """Its state, written to safetensors, gives the same value in one that is built under another seed.

    A checkpoint holds the state of adapters in this form.
    """
    loss = made(subject)
    state = {name: tensor.contiguous() for name, tensor in loss.module.state_dict().items()}
    twin = loss.again(seed=1)
    if state:
        twin.load_state_dict(load(save(state)))
    given = loss.given()
    expected, found = value(loss.module, given), value(twin, given)
    fix = "Register layers as submodules and tensors by register_buffer, so that state_dict holds them."
    require(_close(found, expected), f"it is {expected.item():g}, after loading its state {found.item():g}", fix)


@check
def knobs_take_effect(subject: Subject) -> None:
    """A float option is an attribute of the module, and setting it does what building with it does.

    A controller's ``Set("student.NAME.temperature", 2.0)`` sets the attribute, and says so if there is none.
    """
    loss = made(subject)
    given = loss.given()
    for name, now in loss.options.model_dump().items():
        if not isinstance(now, float) or name in getattr(loss.loss, "fixed", ()):
            continue
        fix = f"Keep self.{name}, and read it in forward(); or name it in the class's `fixed`."
        require(hasattr(loss.module, name), f"it keeps no attribute {name!r} for the option of that name", fix)
        other = _changed(loss.options, name, now)
        if other is None:
            continue
        turned = loss.again()
        setattr(turned, name, getattr(other, name))
        built, found = value(loss.again(other), given), value(turned, given)
        require(_close(found, built), f"built with another {name} it is {built.item():g}, set {found.item():g}", fix)


def _changed(options: Options, name: str, now: float) -> Options | None:
    """The options with another value of one of them; None where none of the tried ones is allowed."""
    for other in (now * 1.5 + 0.1, now * 0.5):
        try:
            return type(options)(**{**options.model_dump(), name: other})
        except ValueError:
            pass
    return None
