"""What a model costs: parameters, FLOPs, latency."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..data import DataInfo

LATENCY_RUNS = 30


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def flops(module: nn.Module, info: DataInfo) -> int:
    """FLOPs of one image forward: two for a multiply-add of convolutions and matrix products, nothing else counted."""
    image = torch.zeros(1, *info.shape, device=next(module.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image)
    return int(counter.get_total_flops())


def latency_ms(module: nn.Module, info: DataInfo) -> float:
    """Milliseconds of the fastest of 30 forward passes of one image, with the stage's threads: other work only adds."""
    device = next(module.parameters()).device
    image = torch.zeros(1, *info.shape, device=device)
    times = []
    with torch.no_grad():
        for _ in range(LATENCY_RUNS):
            start = time.perf_counter()
            module(image)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
    return min(times)
