"""The losses on relations and maps give the numbers of public code (tests/golden/README.md)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_cases import check_float64, load
from kdcore_features.at import AT
from kdcore_features.cc import cc_loss
from kdcore_features.nst import NST
from kdcore_features.options import ATOptions, PKTOptions, RKDOptions, SPOptions, TapOptions
from kdcore_features.pkt import PKT
from kdcore_features.rkd import RKD
from kdcore_features.sp import SP

from kdcore import Outputs, Shapes


def attention(hp):
    return AT, ATOptions(p=hp["p"])


def similarity(hp):
    return SP, SPOptions(deepest=False)


def neighbours(hp):
    assert hp["eps"] == 1e-7
    return PKT, PKTOptions()


def relational(hp):
    assert hp["eps"] == 1e-12
    distance, angle = (
        hp.get(long, hp.get(short)) for long, short in (("distance_weight", "w_d"), ("angle_weight", "w_a"))
    )
    return RKD, RKDOptions(distance_weight=float(distance), angle_weight=float(angle), squared=hp["squared"])


def selectivity(hp):
    return NST, TapOptions()


PUBLIC = {
    "mdistiller__at": attention,
    "repdistiller__attention": attention,
    "mdistiller__sp": similarity,
    "repdistiller__similarity": similarity,
    "mdistiller__pkt": neighbours,
    "repdistiller__pkt": neighbours,
    "mdistiller__rkd": relational,
    "repdistiller__rkd": relational,
    "mdistiller__nst": selectivity,
    "repdistiller__nst": selectivity,
}
CASES = [pytest.param(name, case, id=f"{name}-{head}") for name in PUBLIC for head, case in load(name).items()]
CORRELATION = load("repdistiller__correlation")


def keys(case, side):
    return sorted(key for key in case if key == side or key.startswith(f"{side}_"))


def run(name, case, dtype):
    """The loss, and its gradients by the names under which they are recorded."""
    loss, options = PUBLIC[name](case["hp"])
    sides = [
        {key: torch.from_numpy(case[key]).to(dtype) for key in keys(case, side)} for side in ("student", "teacher")
    ]
    sides[0] = {key: tap.requires_grad_() for key, tap in sides[0].items()}
    shapes = [{key: tuple(tap.shape[1:]) for key, tap in side.items()} for side in sides]
    own, other = (Outputs(next(iter(side.values())), side) for side in sides)
    found = loss.build(Shapes(2, 64, *shapes), options)(own, other, None)
    found.backward()
    return found.item(), {f"grad_{key}": tap.grad.double().numpy() for key, tap in sides[0].items()}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_float64_gives_the_public_loss_and_gradients(name, case):
    loss, gradients = run(name, case, torch.float64)
    assert loss == pytest.approx(case["loss"].item(), rel=1e-10, abs=1e-12)
    for key, grad in gradients.items():
        check_float64(grad, case, key)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_float32_is_as_good_as_the_public_float32(name, case):
    """The error of the public run is one draw: another machine's sums are rounded otherwise."""
    loss, gradients = run(name, case, torch.float32)
    assert loss == pytest.approx(case["loss"].item(), rel=1e-5, abs=4 * abs(case["loss_f32"] - case["loss"]))
    for key, grad in gradients.items():
        bar = max(5e-6 * np.abs(case[key]).max() + 1e-9, case["grad_student_f32_maxabserr"])
        assert np.abs(grad - case[key]).max() <= bar


@pytest.mark.parametrize("case", CORRELATION.values(), ids=CORRELATION)
def test_the_public_correlation_loss_compares_neighbours_of_the_batch_and_is_not_the_papers(case):
    """RepDistiller's, as its paper's authors sent it: no kernel and no matrix, but products of neighbouring rows."""
    student, teacher = (torch.from_numpy(case[side]) for side in ("student", "teacher"))

    def public(student, teacher):
        apart = (student - teacher).abs()
        return (apart[:-1] * apart[1:]).sum(1).mean()

    student.requires_grad_()
    loss = public(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-10, abs=1e-12)
    check_float64(student.grad.numpy(), case)
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(0))
    turned = [side.detach()[order] for side in (student, teacher)]
    assert len(order) == 2 or public(*turned) != pytest.approx(loss.item(), rel=1e-3)
    assert cc_loss(*turned) == pytest.approx(cc_loss(student.detach(), teacher).item(), rel=1e-10)
