"""CRD, OFD and ReviewKD give the numbers of the public code that published tables were made with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import check_float64, load
from kdcore_features.crd import CRD
from kdcore_features.ofd import OFD, margin_of
from kdcore_features.options import CRDOptions, OFDOptions, ReviewKDOptions
from kdcore_features.reviewkd import ReviewKD, hcl
from torch import Tensor, nn

from kdcore import Batch, Outputs, Shapes

DTYPES = [torch.float64, torch.float32]
Case = dict[str, Any]


def cases(*names: str) -> list[Any]:
    return [pytest.param(case, id=f"{name}-{key}") for name in names for key, case in load(name).items()]


def tensors(case: Mapping[str, Any], key: str, dtype: torch.dtype) -> list[Tensor]:
    """``key_0``, ``key_1``, ...: the features of one side, shallow to deep."""
    found = []
    while f"{key}_{len(found)}" in case:
        found.append(torch.from_numpy(case[f"{key}_{len(found)}"]).to(dtype))
    return found


def put(module: nn.Module, names: Mapping[str, str], case: Case) -> dict[str, nn.Parameter]:
    """Gives the module the source's parameters, and those by the source's names."""
    own = dict(module.named_parameters())
    for name, theirs in names.items():
        own[name].data = torch.from_numpy(case[f"param_{theirs}"]).to(own[name].dtype)
    assert own.keys() == names.keys()
    return {f"grad_param_{theirs}": own[name] for name, theirs in names.items()}


def check(found: Tensor, leaves: Mapping[str, Tensor], case: Case, normed: bool = False) -> None:
    """Value and gradients are the recorded ones, by the tolerances of tests/golden/README.md.

    ``normed``: behind a batch norm of few values a gradient is what remains of larger ones; in float32 it is judged by
    the largest of the case.
    """
    exact = found.dtype == torch.float64
    kind = {"rtol": 1e-10, "atol": 1e-12} if exact else {"rtol": 1e-5, "atol": 0}
    np.testing.assert_allclose(found.item(), case["loss"], **kind)
    largest = max(np.abs(case[name]).max() for name in leaves)
    for (name, leaf), grad in zip(leaves.items(), torch.autograd.grad(found, list(leaves.values())), strict=True):
        assert grad.shape == leaf.shape
        if exact:
            check_float64(grad.numpy(), case, name)
        else:
            allowed = 5e-6 * (largest if normed else np.abs(case[name]).max()) + 1e-9
            error = np.abs(grad.double().numpy() - case[name]).max()
            assert error <= max(allowed, case.get("grad_student_f32_maxabserr", 0)), name


def steps(case: Case) -> Iterator[Case]:
    """The steps of a sequence, each a case of its own."""
    for step in range(case["hp"]["steps"]):
        sequence = ("student", "teacher", "index", "contrast_idx", "loss", "aux_Z")
        yield {key: case[key][step] for key in case if key in sequence or key.startswith("grad_")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("mdistiller__crd", "repdistiller__crd"))
def test_crd_is_the_public_loss_at_every_step_and_so_are_its_memories(case, dtype):
    hp = case["hp"]
    shapes = Shapes(2, hp["n_data"], {"pooled": case["student"].shape[2:]}, {"pooled": case["teacher"].shape[2:]},
                    torch.arange(hp["n_data"]) % 2)  # fmt: skip
    options = CRDOptions(feat_dim=hp["feat_dim"], temperature=hp["T"], momentum=hp["momentum"])
    module = CRD.build(shapes, options).to(dtype)
    sides = {"embed_student": "embed_s.linear", "embed_teacher": "embed_t.linear"}
    names = {f"{own}.{part}": f"{theirs}.{part}" for own, theirs in sides.items() for part in ("weight", "bias")}
    parameters = put(module, names, case)
    module.bank_student, module.bank_teacher = (
        torch.from_numpy(case[f"param_memory_v{i}"]).to(dtype) for i in (1, 2)
    )  # fmt: skip
    for step in steps(case):
        student = torch.from_numpy(step["student"]).to(dtype).requires_grad_()
        teacher, index = torch.from_numpy(step["teacher"]).to(dtype), torch.from_numpy(step["index"])
        module.draw = lambda _, step=step: torch.from_numpy(step["contrast_idx"][:, 1:])
        outputs = [Outputs(torch.zeros(len(index), 2), {"pooled": feature}) for feature in (student, teacher)]
        found = module(*outputs, Batch(torch.zeros(len(index)), None, index, 0.0))
        check(found, {"grad_student": student, **parameters}, step)
        np.testing.assert_allclose(module.log_z.exp(), step["aux_Z"], rtol=1e-12 if dtype == torch.float64 else 1e-5)
    for i, bank in enumerate((module.bank_student, module.bank_teacher), start=1):
        np.testing.assert_allclose(bank, case[f"aux_memory_v{i}_after"], atol=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("mdistiller__ofd"))
def test_ofd_is_the_public_loss(case, dtype):
    student, teacher = (tensors(case, side, dtype) for side in ("student", "teacher"))
    taps = [f"stage{i + 1}_pre" for i in range(len(student))]
    norms = [
        tuple(torch.from_numpy(case[f"teacher_bn_{part}_{i}"]).float() for part in ("weight", "bias"))
        for i in range(len(student))
    ]
    sides = ({tap: tuple(x.shape[1:]) for tap, x in zip(taps, side, strict=True)} for side in (student, teacher))
    shapes = Shapes(2, 8, *sides, norms=dict(zip(taps, norms, strict=True)))
    module = OFD.build(shapes, OFDOptions())
    size = case["hp"]["kernel_size"]
    if size != 1:  # the source's option, which no published table uses
        for connect in module.connectors:
            connect[0] = nn.Conv2d(connect[0].in_channels, connect[0].out_channels, size, padding=size // 2, bias=False)
    module = module.to(dtype)
    parts = [f"{i}.{part}" for i in range(len(taps)) for part in ("0.weight", "1.weight", "1.bias")]
    parameters = put(module, {f"connectors.{part}": f"connectors.{part}" for part in parts}, case)
    found = module(outputs(taps, [x.requires_grad_() for x in student]), outputs(taps, teacher), None)
    leaves = {f"grad_student_{i}": x for i, x in enumerate(student)}
    check(case["hp"]["feat_weight"] * found, leaves | parameters, case)
    for i, norm in enumerate(norms):
        np.testing.assert_allclose(margin_of(*norm), case[f"aux_margin_{i}"], rtol=2e-7)


def outputs(taps: list[str], features: list[Tensor]) -> Outputs:
    return Outputs(torch.zeros(len(features[0]), 2), dict(zip(taps, features, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("mdistiller__hcl"))
def test_hierarchical_context_is_the_public_loss(case, dtype):
    student = [x.requires_grad_() for x in tensors(case, "student", dtype)]
    found = hcl(student, tensors(case, "teacher", dtype))
    check(found, {f"grad_student_{i}": x for i, x in enumerate(student)}, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("mdistiller__reviewkd"))
def test_reviewkd_is_the_public_loss(case, dtype):
    hp = case["hp"]
    student, teacher = (tensors(case, side, dtype) for side in ("student", "teacher"))
    taps = [*(f"stage{i}" for i in range(1, len(student))), "pooled"]
    sides = ({tap: tuple(x.shape[1:]) for tap, x in zip(taps, side, strict=True)} for side in (student, teacher))
    module = ReviewKD.build(Shapes(2, 8, *sides), ReviewKDOptions()).to(dtype)
    parts = {
        "enter.0": "conv1.0",
        "enter.1": "conv1.1",
        "attend": "att_conv.0",
        "leave.0": "conv2.0",
        "leave.1": "conv2.1",
    }
    names = {name: name.replace("fusions", "abfs") for name, _ in module.named_parameters()}
    for own, theirs in parts.items():
        names = {name: their.replace(own, theirs) for name, their in names.items()}
    parameters = put(module, names, case)
    found = module(outputs(taps, [x.requires_grad_() for x in student]), outputs(taps, teacher), None)
    weight = hp["reviewkd_weight"] * min(hp["epoch"] / hp["warmup_epochs"], 1)  # the recipe's, in the product
    leaves = {f"grad_student_{i}": x for i, x in enumerate(student)}
    check(weight * found, leaves | parameters, case, normed=True)
