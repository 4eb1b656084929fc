"""Taps for models of other libraries, whose parameter names and arithmetic stay as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import DataError, DataInfo


class Head(nn.Module):
    """A linear layer whose input [B, D] is a tap, ``pooled``; parameters are those of ``linear``, by the same names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.pooled = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(self.pooled(features), self.weight, self.bias)


class Rectifier(nn.Module):
    """A ReLU whose input is a tap, ``pre``, which a ReLU in place would overwrite.

    A block that calls it more than once has its last input as the tap: what is tapped is the last output of a module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pre(x))


def tap_head(model: nn.Module, path: str) -> dict[str, str]:
    """Makes the input of the linear layer ``path`` the tap ``pooled``."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    model.set_submodule(path, Head(linear))
    return {"pooled": f"{path}.pooled"}


def tap_map(block: nn.Module) -> str:
    """A name under ``block`` for its output [B, H, W, C] as a map [B, C, H, W], the order of every other map."""
    block.map = nn.Identity()
    block.register_forward_hook(_show_map)
    return "map"


def _show_map(block: nn.Module, args: Any, output: Tensor) -> None:
    block.map(output.permute(0, 3, 1, 2))  # a view: no copy


def check_images(model: nn.Module, data: DataInfo, name: str) -> None:
    """Runs the model on shapes alone: no arithmetic, no random numbers, and batch norm's buffers are copies.

    Raises:
        DataError: it cannot take images of this shape; says what its library says.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = {path: torch.empty_like(tensor, device="meta") for path, tensor in tensors}
    model.eval()
    try:
        logits = torch.func.functional_call(model, shapes, torch.empty(2, *data.shape, device="meta"))
        assert logits.shape == (2, data.classes), f"logits have shape {tuple(logits.shape)}"
    except UNFIT as error:
        raise cannot_take(data, name, error) from error
    model.train()


UNFIT = (RuntimeError, ValueError, AssertionError, ZeroDivisionError)
"""What libraries raise for images of a wrong shape."""


def cannot_take(data: DataInfo, name: str, error: Exception) -> DataError:
    shape = "x".join(str(n) for n in data.shape)
    fix = "Use larger images, or a model for small ones such as 'resnet'."
    return DataError(f"it cannot take {shape} images: {error}", where=f"model {name!r}", fix=fix)
