"""A teacher whose classes are not the data's, as one that gives logits of the data's classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import DataInfo
from ..label_maps import Groups


class Mapped(nn.Module):
    """A network whose classes are summed in groups: logits [B, len(groups)], the logarithms of sums of exponentials.

    Their softmax is the network's probability of each group, renormalised over the classes that are in a group. Half
    logits become float32. The state dict is the network's, name by name, and its taps stay.

    Args:
        network: images -> logits [B, classes].
        classes: of the network.
        groups: for each class that it gives, the network's classes that it stands for.
    """

    index: Tensor

    def __init__(self, network: nn.Module, classes: int, groups: Groups) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        self.taps, self.norms = _inside(network, "taps"), _inside(network, "norms")
        width = max(len(group) for group in groups)
        rows = [[*group, *[classes] * (width - len(group))] for group in groups]  # padded by a class of logit -inf
        self.register_buffer("index", torch.tensor(rows), persistent=False)
        self.register_state_dict_post_hook(_leave)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_enter)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        if logits.dtype != torch.float64:
            logits = logits.float()
        padded = F.pad(logits, (0, 1), value=float("-inf"))
        return padded[:, self.index].logsumexp(dim=2)


def _inside(network: nn.Module, name: str) -> dict[str, str]:
    """The network's table of named places, as they are seen from outside."""
    places: Mapping[str, str] = getattr(network, name, {})
    return {key: f"network.{path}".removesuffix(".") for key, path in places.items()}


def _leave(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, f"{prefix}network.", prefix)


def _enter(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix, f"{prefix}network.")


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    """Changes the beginning of names in place, in the same order."""
    items = [(new + key.removeprefix(old) if key.startswith(old) else key, value) for key, value in state.items()]
    state.clear()
    state.update(items)


def classes_of(module: nn.Module, info: DataInfo) -> int:
    """The number of logits that the module's weights give."""
    return module.classes if isinstance(module, Mapped) else info.classes
