"""How long the work of each member takes: the host's time on a CPU, the device's own on CUDA."""

from __future__ import annotations

import time

import torch

from .member import Learner


class Stopwatch:
    """Adds to the seconds of learners. ``with stopwatch.of(learner): ...`` costs about a microsecond.

    On CUDA the work is only begun there: events mark both ends in its stream, and :meth:`settle` reads them at a log
    point, where the device is waited for anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_cuda = device, device.type == "cuda"
        self.learner: Learner | None = None
        self.began = 0.0
        self.marked: list[tuple[Learner, torch.cuda.Event, torch.cuda.Event]] = []

    def of(self, learner: Learner) -> Stopwatch:
        """The next block's work is this learner's. Blocks do not nest."""
        self.learner = learner
        return self

    def __enter__(self) -> None:
        assert self.learner is not None
        if self.on_cuda:
            self.marked.append((self.learner, self._mark(_event()), _event()))
        else:
            self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        assert self.learner is not None
        if self.on_cuda:
            self._mark(self.marked[-1][2])
        else:
            self.learner.seconds += time.perf_counter() - self.began

    def settle(self) -> None:
        """Waits for what was begun, and adds its time."""
        if self.marked:
            self.marked[-1][2].synchronize()
        for learner, began, ended in self.marked:
            learner.seconds += began.elapsed_time(ended) / 1000
        self.marked.clear()

    def _mark(self, event: torch.cuda.Event) -> torch.cuda.Event:
        """Records the event in the stream of the stage's device, which need not be the current one."""
        event.record(torch.cuda.current_stream(self.device))
        return event


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
