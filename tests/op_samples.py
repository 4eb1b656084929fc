"""Logits for the tests of the ops."""

import pytest
import torch

from kdcore.losses import dkd_loss, kd_loss

MODES = ("none", "class", "instance")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOSSES = {"kd": kd_loss, "dkd": dkd_loss}
COMMON = {
    "temperature": 4.0,
    "alpha": 1.0,
    "beta": 8.0,
    "kd_weight": 0.7,
    "ce_weight": 0.3,
    "label_smoothing": 0.1,
    "eps": 1e-5,
    "ignore_index": -100,
    "normalize": 1,
    "decoupled": True,
    "cross_entropy": True,
    "through": True,
}
NUMBERS = 7  # the first of them, in the order of the schemas
ops = torch.ops.kdcore

both_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sample(rows=6, classes=5, dtype=torch.float32, *, strided=False):
    """Student, teacher and labels, one of them to be left out."""
    width = classes + 3 if strided else classes
    student, teacher = (normal(rows, width, dtype=dtype, seed=seed)[:, :classes] for seed in (0, 1))
    if strided:
        teacher = teacher.t().contiguous().t()
    index = torch.arange(rows) % classes
    index[1:2] = -100
    return student, teacher, index
