"""The moving average of a member's weights."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """An exponential moving average of a module's parameters and buffers, in :attr:`module`. The first update copies
    all of them, and every update those of whole numbers: a counter, or a mask, has no average.

    torch's AveragedModel has the same state and asks the device twice an update how many there were.

    Args:
        module: what is averaged; copied.
        decay: the share of the average that an update keeps.
    """

    n_averaged: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(module), decay
        self.register_buffer("n_averaged", torch.tensor(0))  # on the host

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards a module's state; no sync, and a few kernels."""
        own, new = (list(chain(part.parameters(), part.buffers())) for part in (self.module, module))
        begun = bool(self.n_averaged)
        moved = [begun and (tensor.is_floating_point() or tensor.is_complex()) for tensor in own]
        pairs = list(zip(own, new, moved, strict=True))
        if any(moved):
            torch._foreach_lerp_([a for a, _, m in pairs if m], [b for _, b, m in pairs if m], 1 - self.decay)
        if not all(moved):
            torch._foreach_copy_([a for a, _, m in pairs if not m], [b for _, b, m in pairs if not m])
        self.n_averaged += 1
