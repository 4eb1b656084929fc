"""Loss scaling for float16: gradients are multiplied out of its small range, and updates that overflow are skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericError
from ..plan import Json

ENDLESS = 32
"""Skipped updates in a row that end a stage: a scale of 65,536 is then 2^-16."""


class Scaler:
    """torch.amp.GradScaler for one member, with a count of the updates that it skipped.

    Args:
        device: where the member's gradients are.
    """

    def __init__(self, device: torch.device) -> None:
        self.amp = torch.amp.GradScaler(device.type)
        self.value = self.amp.get_scale()
        self.skipped = 0  # since the last :meth:`take`
        self.row = 0  # skipped one after the other

    def scale(self, loss: Tensor) -> Tensor:
        """The loss that gradients are taken of."""
        return self.amp.scale(loss)

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip: float | None, where: str
    ) -> bool:
        """Unscales, clips and steps; False where a gradient was not finite and the step was left out. Two syncs, or one
        where the optimizer is fused, which looks at the gradients itself.

        Raises:
            NumericError: it is one of too many in a row.
        """
        self.amp.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        self.amp.step(optimizer)
        self.amp.update()
        before, self.value = self.value, self.amp.get_scale()
        skipped = self.value < before
        self.skipped, self.row = self.skipped + skipped, self.row + 1 if skipped else 0
        if self.row >= ENDLESS:
            what = f"{self.row} updates in a row were skipped: gradients are not finite, down to a scale of {before:g}"
            raise NumericError(what, where=where, fix='Lower train.lr, or write precision = "bfloat16".')
        return not skipped

    def take(self) -> dict[str, float]:
        """For the curve: updates skipped since the last call, and the scale."""
        row = {"skipped": float(self.skipped), "scale": self.value}
        self.skipped = 0
        return row

    def state_dict(self) -> dict[str, Json]:
        """Plain numbers."""
        return {"amp": self.amp.state_dict(), "skipped": self.skipped, "row": self.row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what :meth:`state_dict` gave."""
        self.amp.load_state_dict(state["amp"])
        self.value, self.skipped, self.row = self.amp.get_scale(), int(state["skipped"]), int(state["row"])
