"""The optimizers that come with the core: torch's own, and two for large batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim

from .options import AdamWOptions, LAMBOptions, LARSOptions, SGDOptions


def sgd(parameters: Iterable[nn.Parameter], lr: float, options: SGDOptions) -> optim.Optimizer:
    """torch.optim.SGD."""
    return optim.SGD(
        parameters, lr=lr, momentum=options.momentum, weight_decay=options.weight_decay, nesterov=options.nesterov
    )


def adamw(parameters: Iterable[nn.Parameter], lr: float, options: AdamWOptions) -> optim.Optimizer:
    """torch.optim.AdamW (Loshchilov & Hutter 2019)."""
    return optim.AdamW(parameters, lr=lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)


class LARS(optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv 1708.03888).

    ``v = momentum v + trust |w| / (|g| + decay |w|) (g + decay w)``, then ``w -= lr v``, for each parameter. The rate
    is outside of the momentum, as in torch.optim.SGD; the paper has it inside, which differs where the rate changes.
    Parameters of one dimension (biases, scales of norms) are neither decayed nor adapted, and where a norm is 0 the
    factor is 1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, options: LARSOptions) -> None:
        defaults = {"lr": lr, "momentum": options.momentum, "trust": options.trust}
        super().__init__(_by_dimension(parameters, options.weight_decay), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; no sync."""
        for group in self.param_groups:
            weights, gradients = _with_gradients(group)
            if not weights:
                continue
            buffers = [self._buffer(weight) for weight in weights]
            decay = group["weight_decay"]
            moves = list(torch._foreach_add(gradients, weights, alpha=decay))
            if group["adapt"]:
                sizes, slopes = _norms(weights), _norms(gradients)
                ratios = group["trust"] * sizes / (slopes + decay * sizes)
                torch._foreach_mul_(moves, _where_known(ratios, sizes, slopes))
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, moves)
            torch._foreach_add_(weights, buffers, alpha=-group["lr"])

    def _buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        found: Tensor = state["momentum_buffer"]
        return found


class LAMB(optim.Optimizer):
    """Layer-wise adaptive moments (You et al., ICLR 2020, arXiv 1904.00962, algorithm 2, with |w| itself as its phi).

    Adam's step ``r`` with bias correction, then ``w -= lr |w| / |r + decay w| (r + decay w)`` for each parameter.
    Exceptions as of :class:`LARS`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, options: LAMBOptions) -> None:
        defaults = {"lr": lr, "betas": options.betas, "eps": options.eps}
        super().__init__(_by_dimension(parameters, options.weight_decay), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; no sync."""
        for group in self.param_groups:
            weights, gradients = _with_gradients(group)
            if not weights:
                continue
            moves = self._adam(weights, gradients, group["betas"], group["eps"])
            torch._foreach_add_(moves, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                sizes, lengths = _norms(weights), _norms(moves)
                torch._foreach_mul_(moves, _where_known(sizes / lengths, sizes, lengths))
            torch._foreach_add_(weights, moves, alpha=-group["lr"])

    def _adam(
        self, weights: list[Tensor], gradients: list[Tensor], betas: tuple[float, float], eps: float
    ) -> list[Tensor]:
        beta, beta2 = betas
        states = [self._moments(weight) for weight in weights]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - beta)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        moves = list(torch._foreach_div(means, [1 - beta ** state["step"] for state in states]))
        roots = torch._foreach_sqrt(torch._foreach_div(squares, [1 - beta2 ** state["step"] for state in states]))
        torch._foreach_div_(moves, torch._foreach_add(roots, eps))
        return moves

    def _moments(self, weight: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state["step"] += 1
        return state


def _by_dimension(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Parameters that are decayed and adapted, and those of one dimension, which are neither."""
    found = list(parameters)
    large, small = [p for p in found if p.ndim > 1], [p for p in found if p.ndim <= 1]
    groups = [
        {"params": large, "weight_decay": decay, "adapt": True},
        {"params": small, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    weights = [weight for weight in group["params"] if weight.grad is not None]
    return weights, [weight.grad for weight in weights]


def _norms(tensors: list[Tensor]) -> Tensor:
    """[N] of N tensors."""
    return torch.stack(torch._foreach_norm(tensors))


def _where_known(ratios: Tensor, *norms: Tensor) -> list[Tensor]:
    """The ratios [N], each 0-d, and 1 where one of the norms is 0."""
    known = torch.stack(norms).gt(0).all(0)
    return list(torch.where(known, ratios, 1.0).unbind())
