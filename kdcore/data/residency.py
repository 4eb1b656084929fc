"""Where the training images lie: on the device if they fit there, else on the host, copied one batch ahead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .types import Images

SHARE = 0.5
"""Of the free device memory that the training images may take; the rest is for models and their graphs."""


def fits(images: Tensor | Images, free: int | None) -> bool:
    """True if images [N, C, H, W] may be put where ``free`` bytes are free; None: they are where batches are wanted."""
    return isinstance(images, Tensor) and (free is None or images.nbytes <= SHARE * free)


@dataclass
class Ahead:
    """Images on the host. Those of the next step are gathered and copied while the device still works on this one.

    Gathering is work of the host, into pinned memory; the copy runs on a stream of its own.

    Args:
        images: [N, C, H, W], on the host.
        device: where batches are wanted.
        index: gives the samples [B] int64, on the host, of any step.
    """

    images: Tensor
    device: torch.device
    index: Callable[[int], Tensor]
    _coming: tuple[int, Tensor] | None = None
    _stream: torch.cuda.Stream | None = field(init=False)

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def at(self, step: int) -> Tensor:
        """The images [B, C, H, W] of a step, on the device."""
        images = self._coming[1] if self._coming is not None and self._coming[0] == step else self._sent(step)
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            images.record_stream(current)
        self._coming = (step + 1, self._sent(step + 1))
        return images

    def _sent(self, step: int) -> Tensor:
        index = self.index(step)
        shape = (len(index), *self.images.shape[1:])
        batch = torch.empty(shape, dtype=self.images.dtype, pin_memory=self._stream is not None)
        torch.index_select(self.images, 0, index, out=batch)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return batch.to(self.device, non_blocking=True)  # torch keeps the pinned block until it is copied
