"""What holds on the CPU holds on a GPU; `make test` leaves these out."""

from __future__ import annotations

import pytest
import torch
from small import RECIPE, file_hash, make_run

from kdcore.losses import dkd_loss, kd_loss

pytestmark = pytest.mark.gpu
ON_GPU = {**RECIPE, "device": "cuda", "student": {"model": "cnn", "size": 2, "width": 0.25}}


@pytest.mark.parametrize("loss", [kd_loss, dkd_loss])
@pytest.mark.parametrize("normalize", ["none", "class", "instance"])
def test_losses_on_the_gpu_equal_those_on_the_cpu(loss, normalize):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 100, generator=generator) * 3 for _ in range(2))
    target = torch.randint(100, (64,), generator=generator)
    found = {}
    for device in ("cpu", "cuda"):
        leaf = student.to(device).requires_grad_()
        value = loss(leaf, teacher.to(device), target.to(device), normalize=normalize, ce_weight=1.0)
        value.backward()
        found[device] = value.detach().cpu(), leaf.grad.cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-5, atol=1e-6)


def test_the_same_recipe_gives_the_same_weights_on_the_gpu(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, recipe=ON_GPU).execute()
    hashes = {file_hash(tmp_path / name / "run" / "student.safetensors") for name in ("a", "b")}
    assert len(hashes) == 1


def test_bfloat16_trains_on_the_gpu(tmp_path):
    result = make_run(tmp_path, recipe={**ON_GPU, "precision": "bfloat16"}).execute()
    assert result["student"]["test_accuracy"] > 0.15
