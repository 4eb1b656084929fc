"""Every registered loss in float32 is its own definition in float64, on 32 random batches each."""

from __future__ import annotations

import pytest
import torch

from kdcore import Outputs
from kdcore.plugins import load_plugins
from kdcore.testing.made_up import Made, gradients, value

CASES = 32
CATALOG = load_plugins().catalog
LOSSES = CATALOG.all("loss")


def outputs(side: Outputs, dtype: torch.dtype, draw) -> Outputs:
    taps = {name: draw(tap.shape).to(dtype) for name, tap in side.taps.items()}
    return Outputs(draw(side.logits.shape).to(dtype), taps)


def batches(made: Made, seed: int):
    """The same random batch in both precisions; every number is exact in float32."""
    given, scale = made.given(), 0.25 * 2 ** (seed % 6)
    for dtype in (torch.float64, torch.float32):
        generator = torch.Generator().manual_seed(seed)

        def draw(shape, generator=generator):
            return scale * torch.randn(shape, generator=generator)

        student = outputs(given.student, dtype, draw)
        teacher = None if given.teacher is None else outputs(given.teacher, dtype, draw)
        found = type(given)(student, teacher, given.batch)
        yield found.map_student(torch.Tensor.requires_grad_)


@pytest.mark.parametrize("entry", LOSSES, ids=lambda entry: entry.full_name)
def test_float32_is_float64_but_for_rounding(entry):
    options = entry.options_class()
    made = Made.of(entry.load(), options(**options.example), CATALOG)
    single, double = made.module, made.again().double()
    for seed in range(CASES):
        exact, rounded = batches(made, seed)
        expected, found = value(double, exact).item(), value(single, rounded).item()
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), f"case {seed}"
        pairs = zip(gradients(double, exact), gradients(single, rounded), strict=True)
        for want, got in ((a, b) for a, b in pairs if a is not None):
            assert (got.double() - want).abs().max() <= 1e-4 * want.abs().max() + 1e-6, f"case {seed}"
