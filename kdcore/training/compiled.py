"""Members by torch.compile: what is frozen for good with its weights folded in, the rest as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..errors import DeviceError
from .member import Learner

GRAPHS = 64
"""Of one model class in a stage. Beyond torch's own 8 it would run uncompiled without a word, to other bits."""


@contextmanager
def fresh_graphs(compiled: bool) -> Iterator[None]:
    """Inside, graphs are a stage's own: those that a process compiled before would serve, or use up what it may have.

    A graph of a model without taps does not serve for one of its class with taps.
    """
    if not compiled:
        yield
        return
    torch.compiler.reset()
    settings = {"skip_nnmodule_hook_guards": False, "recompile_limit": GRAPHS, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(settings):
        yield


def compile_member(learner: Learner) -> Callable[..., Any]:
    """The learner's module for batches of one shape; shares its parameters, and its taps' hooks."""
    call = torch.compile(learner.module, dynamic=False)
    # freezing makes weights constants: convolutions take batch norms in, and are laid out for the machine, once;
    # dynamo looks at the setting while it traces, so an option of torch.compile comes too late
    around = torch._inductor.config.patch(freezing=True) if not learner.spec.terms else nullcontext()

    def run(*inputs: Any) -> Any:
        try:
            with around:
                return call(*inputs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            what = f"torch.compile failed on {learner.spec.model}: {str(error).partition(chr(10))[0]}"
            fix = "Leave compile out; on a CPU it wants a C++ compiler."
            raise DeviceError(what, where=f"member {learner.name!r}", fix=fix) from error

    return run


def fuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """One kernel for all updates, where torch has one."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group |= {"fused": True, "foreach": False}
