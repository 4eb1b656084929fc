"""Optimizers for large batches against their papers, written down once more in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import RECIPE, die_at_step_30, make_run, weights
from torch import nn

from kdcore.training.optimizers import LAMB, LARS
from kdcore.training.options import LAMBOptions, LARSOptions

SHAPES = ((3, 2), (4,), (2, 2, 3, 3), ())


def lars(w, g, state, step, lr, options):
    decay, ratio = (options.weight_decay, 1.0) if w.ndim > 1 else (0.0, 1.0)
    size, slope = w.norm(), g.norm()
    if w.ndim > 1 and size > 0 and slope > 0:
        ratio = options.trust * size / (slope + decay * size)
    state["v"] = options.momentum * state.get("v", 0) + ratio * (g + decay * w)
    return w - lr * state["v"]


def lamb(w, g, state, step, lr, options):
    one, two = options.betas
    state["m"] = one * state.get("m", 0) + (1 - one) * g
    state["s"] = two * state.get("s", 0) + (1 - two) * g * g
    r = (state["m"] / (1 - one**step)) / ((state["s"] / (1 - two**step)).sqrt() + options.eps)
    r = r + (options.weight_decay * w if w.ndim > 1 else 0)
    known = w.ndim > 1 and w.norm() > 0 and r.norm() > 0
    return w - lr * (w.norm() / r.norm() if known else 1.0) * r


CASES = [
    (LARS, lars, LARSOptions(momentum=0.8, weight_decay=0.01, trust=0.02)),
    (LARS, lars, LARSOptions(momentum=0.0)),
    (LAMB, lamb, LAMBOptions(weight_decay=0.05)),
    (LAMB, lamb, LAMBOptions(weight_decay=0.0, betas=(0.5, 0.9))),
]


@pytest.mark.parametrize(("cls", "paper", "options"), CASES)
@settings(max_examples=10, deadline=None)  # the first update imports half of torch
@given(seed=st.integers(0, 2**32), rates=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=5), zero=st.booleans())
def test_updates_are_those_of_the_paper(cls, paper, options, seed, rates, zero):
    draw = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
    start[0] *= not zero
    parameters, wanted = [nn.Parameter(w.clone()) for w in start], start
    optimizer, states = cls(parameters, rates[0], options), [{} for _ in start]
    for step, rate in enumerate(rates, 1):
        gradients = [torch.randn(w.shape, generator=draw, dtype=torch.float64) for w in start]
        wanted = [paper(w, g, s, step, rate, options) for w, g, s in zip(wanted, gradients, states, strict=True)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for parameter, expected in zip(parameters, wanted, strict=True):  # the same to float64's last digits
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize(("cls", "options"), [(LARS, LARSOptions(weight_decay=0.1)), (LAMB, LAMBOptions())])
def test_a_gradient_of_zero_is_no_division_by_zero(cls, options):
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    cls([weight], 0.1, options).step()
    assert weight.isfinite().all()


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_a_parameter_without_a_gradient_stays(cls):
    still, moved = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    moved.grad = torch.ones(2, 2)
    cls([still, moved], 0.1, {LARS: LARSOptions, LAMB: LAMBOptions}[cls]()).step()
    assert still.equal(torch.ones(2, 2))
    assert not moved.equal(still)


def test_the_length_of_a_layers_step_does_not_depend_on_the_scale_of_its_gradient():
    moves = []
    for scale in (1e-3, 1e3):
        weight = nn.Parameter(torch.full((2, 2), 2.0))
        weight.grad = torch.full((2, 2), scale)
        LARS([weight], 1.0, LARSOptions(trust=0.01)).step()
        moves.append((2.0 - weight).norm().item())
    assert moves == pytest.approx([0.01 * 4.0] * 2, rel=1e-4)
    assert math.isclose(*moves, rel_tol=1e-4)


@pytest.mark.long  # test_accumulate has a shorter one, of lars
@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_a_killed_run_goes_on_bit_exact(tmp_path, host, optimizer):
    train = {"epochs": 4, "optimizer": optimizer, "lr": {"lars": 5.0, "lamb": 0.1}[optimizer]}
    recipe = {**RECIPE, "train": train, "execute": {"log_every": 5, "checkpoint_seconds": 0}}
    result = make_run(tmp_path / "whole", recipe=recipe, host=host).execute()
    assert result["student"]["monitor_accuracy"] > 0.5
    die_at_step_30(make_run(tmp_path / "killed", recipe=recipe, host=host))
    make_run(tmp_path / "killed", recipe=recipe, host=host).execute()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
