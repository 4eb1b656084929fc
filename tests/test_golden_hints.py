"""Hints, stages and singular vectors give the numbers of public code (tests/golden/README.md)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_cases import load
from kdcore_features.ab import ab_loss
from kdcore_features.fitnet import fitnet_loss, regressor
from kdcore_features.fsp import fsp_loss
from kdcore_features.ft import ft_loss
from kdcore_features.kdsvd import kdsvd_to, leading
from kdcore_features.maps import match
from kdcore_features.vid import predictor, vid_loss

FILES = [
    "mdistiller__fitnet", "mdistiller__vid", "mdistiller__kdsvd", "repdistiller__hint", "repdistiller__vid",
    "repdistiller__ab", "repdistiller__factor", "repdistiller__fsp", "repdistiller__kdsvd",
]  # fmt: skip
CASES = [(file, name) for file in FILES for name in sorted(load(file))]
DTYPES = [torch.float64, torch.float32]


class Given:
    """A case's arrays as tensors: inputs and parameters require a gradient."""

    def __init__(self, case, dtype):
        self.case, self.dtype, self.leaves = case, dtype, {}
        self.student = self._stages("student", self.leaf)
        self.teacher = self._stages("teacher", self.tensor)

    def _stages(self, side, read):
        names = sorted(key for key in self.case if key == side or key.startswith(f"{side}_"))
        return [read(name) for name in names]

    def tensor(self, key):
        return torch.tensor(self.case[key], dtype=self.dtype)

    def leaf(self, key):
        """An array whose gradient was recorded."""
        self.leaves[f"grad_{key}"] = self.tensor(key).requires_grad_()
        return self.leaves[f"grad_{key}"]

    def fill(self, module, **names):
        """Runs a module on the student with the recorded parameters, by their names in the source."""
        parameters = {own: self.leaf(f"param_{name}") for own, name in names.items()}
        with torch.no_grad():
            module = module.to(self.dtype)
        return torch.func.functional_call(module, parameters, self.student[0])


# The public losses in the product's terms.


def fitnet(given):
    """The convolution's bias is left out: the norm absorbs it, so that its gradient is 0."""
    case = given.case
    module = regressor(case["student"].shape[1:], case["teacher"].shape[1:])
    kinds = {"Conv2d": torch.nn.Conv2d, "ConvTranspose2d": torch.nn.ConvTranspose2d}
    conv, hp = module.conv, case["hp"]
    assert type(conv) is kinds[hp["conv"]]
    for name, recorded in (("kernel_size", "kernel"), ("stride", "stride"), ("padding", "padding")):
        assert list(getattr(conv, name)) == hp[recorded]
    assert np.abs(case["grad_param_conv.bias"]).max() < 1e-13
    names = ("conv.weight", "bn.weight", "bn.bias")
    found = given.fill(module, **{name: name for name in names})
    return hp["feat_weight"] * fitnet_loss(found, given.teacher[0])


def vid(given):
    """mdistiller never trains the log-scales, which it keeps outside of its parameters: the product does."""
    case = given.case
    module = predictor(case["student"].shape[1:], case["teacher"].shape[1:])
    names = {f"{own}.weight": f"regressor.{theirs}.weight" for own, theirs in ((1, 0), (3, 2), (5, 4))}
    mean = given.fill(module, **names)
    mean, teacher = match(mean, given.teacher[0])
    return vid_loss(mean, teacher, given.leaf("param_log_scale"), eps=case["hp"]["eps"])


def kdsvd(unfold):
    def call(given):
        """The vectors are the product's, with the signs that LAPACK gave the source."""
        count = given.case["hp"]["k"]
        kept = [leading(feature, count, unfold) for feature in given.teacher]
        signed = []
        for i, (vectors, _) in enumerate(kept):
            recorded = given.case.get(f"aux_teacher_v_f64_{i}", given.case[f"aux_teacher_v_{i}"])
            recorded = torch.tensor(recorded, dtype=given.dtype)
            signed.append(vectors * (vectors * recorded).sum(1, keepdim=True).sign())
            torch.testing.assert_close(signed[i], recorded, rtol=0, atol=1e-9 if given.dtype == torch.float64 else 1e-4)
        return kdsvd_to(signed, [values for _, values in kept], given.student, unfold)

    return call


LOSSES = {
    "mdistiller__fitnet": fitnet,
    "mdistiller__vid": vid,
    "mdistiller__kdsvd": kdsvd("width"),
    "repdistiller__hint": lambda given: fitnet_loss(given.student[0], given.teacher[0]),
    "repdistiller__vid": vid,
    "repdistiller__ab": lambda given: ab_loss(given.student, given.teacher, margin=given.case["hp"]["margin"]),
    "repdistiller__factor": lambda given: ft_loss(
        given.student[0], given.teacher[0], power=given.case["hp"]["p1"], norm=given.case["hp"]["p2"]
    ),
    "repdistiller__fsp": lambda given: fsp_loss(given.student, given.teacher),
    "repdistiller__kdsvd": kdsvd("channels"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize(("file", "name"), CASES)
def test_losses_and_gradients_are_those_of_public_code(file, name, dtype):
    case = load(file)[name]
    given = Given(case, dtype)
    found = LOSSES[file](given)
    exact = dtype == torch.float64
    expected = float(case.get("loss_f64", case["loss"]))  # that source computes in float32; this is without its cast
    assert found.item() == pytest.approx(expected, rel=1e-10 if exact else 1e-5, abs=1e-12 if exact else 0)
    keys = list(given.leaves)
    grads = torch.autograd.grad(found, [given.leaves[key] for key in keys])
    for key, grad in zip(keys, grads, strict=True):
        expected = case.get(key.replace("grad_student_", "grad_student_f64_"), case[key])
        allowed = bar(file, case, key, expected, exact)
        assert np.abs(grad.double().numpy() - expected).max() <= allowed, key


def bar(file, case, key, expected, exact):
    """How far a gradient may be off. In float32 a singular vector is off by rounding over the gap to its neighbours:
    mdistiller's own float32 run, the recorded gradient, by up to 2e-5 of the largest, and each LAPACK rounds otherwise.
    """
    largest = np.abs(expected).max()
    if exact:
        return 1e-9 * largest + 1e-13
    relative = 4e-5 if "kdsvd" in file else 5e-6
    own = np.abs(case[key] - expected).max()
    return max(relative * largest + 1e-9, own, float(case.get("grad_student_f32_maxabserr", 0.0)))


def test_every_recorded_gradient_is_compared():
    for file, name in CASES:
        case = load(file)[name]
        given = Given(case, torch.float64)
        LOSSES[file](given)
        recorded = {key for key in case if key.startswith("grad_") and "_f64_" not in key and "_f32_" not in key}
        assert recorded - set(given.leaves) <= {"grad_param_conv.bias"}, (file, name)
