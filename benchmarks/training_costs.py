"""What a step costs: seconds, memory, shares of its operations and of its parts, how busy the GPU was."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

Step = Callable[[], None]
PROFILED = 10  # steps at most
PARTS = ("data", "teacher", "student forward", "loss", "backward", "update")


def timed(step: Step, count: int, device: str) -> float:
    """Seconds of so many steps."""
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def costs(step: Step, count: int, device: str) -> dict[str, Any]:
    """What a step costs besides time, found in ``count`` more of them or fewer."""
    count = min(count, PROFILED)
    found = {"peak_mb": peak(device), **profiled(step, count, device)}
    if hasattr(step, "session"):
        found["parts"] = parts(step, count, device)
        found["filling"] = step.filling()
    return found


def peak(device: str) -> float:
    """MiB: of the device's allocator, or of the whole process on a CPU, without those of its DataLoader."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- by operation


def profiled(step: Step, count: int, device: str) -> dict[str, Any]:
    """Shares of a step by kind of operation, on its device; on a GPU also the share of time in which it was busy."""
    gpu = device != "cpu"
    activities = [torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        seconds = timed(step, count, device)
    rows = [(row.key, row.self_device_time_total if gpu else row.self_cpu_time_total) for row in profile.key_averages()]
    rows.sort(key=lambda row: -row[1])
    total = sum(time for _, time in rows)
    found: dict[str, Any] = {"shares": {name[:60]: round(time / total, 4) for name, time in rows[:12]}}
    if gpu:
        found["busy"] = busy(profile) / (seconds * 1e6)
    return found


def busy(profile: Any) -> float:
    """Microseconds in which at least one kernel or copy ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    total, end = 0.0, 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


# -- by part


def parts(step: Any, count: int, device: str) -> dict[str, float]:
    """Shares of a step of the framework by part; the rest is "other".

    On a GPU a part lasts from its first kernel to its last in the stream: gaps between them count. The loss computes
    its gradient at the logits as well; "backward" is the students'.
    """
    stopwatch, found = watch(step.session)
    seconds = timed(step, count, device)
    stopwatch.settle()
    shares = {name: part.seconds / seconds for name, part in found.items()}
    return {name: round(share, 4) for name, share in {**shares, "other": 1 - sum(shares.values())}.items()}


def watch(session: Any) -> tuple[Any, dict[str, Any]]:
    """Measures the parts of a session's steps from now on, by the framework's own stopwatch."""
    from kdcore.training.stopwatch import Stopwatch

    stopwatch, context = Stopwatch(session.device), session.context
    found: dict[str, Any] = {name: SimpleNamespace(seconds=0.0) for name in PARTS}

    def measured(call: Callable[..., Any], part_of: Callable[..., str]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with stopwatch.of(found[part_of(*args)]):
                return call(*args, **kwargs)

        return run

    session.source.batch = measured(session.source.batch, lambda *_: "data")
    for learner in session.learners.values():
        if learner.cached is not None:
            learner.cached.outputs = measured(learner.cached.outputs, lambda *_: "teacher")
    context.forward = measured(
        context.forward, lambda name, *_: "student forward" if name in context.trained else "teacher"
    )
    for method, part in (("loss", "loss"), ("backward", "backward"), ("apply", "update")):
        setattr(context, method, measured(getattr(context, method), lambda *_, part=part: part))
    return stopwatch, found
