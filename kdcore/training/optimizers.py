"""The optimizers that come with the core: torch's own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn, optim

from .options import AdamWOptions, SGDOptions


def sgd(parameters: Iterable[nn.Parameter], lr: float, options: SGDOptions) -> optim.Optimizer:
    """torch.optim.SGD."""
    return optim.SGD(
        parameters, lr=lr, momentum=options.momentum, weight_decay=options.weight_decay, nesterov=options.nesterov
    )


def adamw(parameters: Iterable[nn.Parameter], lr: float, options: AdamWOptions) -> optim.Optimizer:
    """torch.optim.AdamW (Loshchilov & Hutter 2019)."""
    return optim.AdamW(parameters, lr=lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)
