"""What the families of the CIFAR zoo share: names of taps and norms, and initial weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def tap_paths(stem: str, stages: Iterable[tuple[str, str]], pooled: str = "pool") -> dict[str, str]:
    """Taps by name; ``stages`` are paths of modules, (before the activation, after it), first stage first."""
    taps = {"stem": stem}
    for stage, (before, after) in enumerate(stages, start=1):
        taps |= {f"stage{stage}_pre": before, f"stage{stage}": after}
    return taps | {"pooled": pooled}


def norm_paths(norms: Iterable[str]) -> dict[str, str]:
    """The batch norm of each ``stageN_pre``, first stage first."""
    return {f"stage{stage}_pre": path for stage, path in enumerate(norms, start=1)}


def he_convolutions(module: nn.Module) -> None:
    """He-normal convolutions, by fan-out; the rest as torch draws it."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def he_without_biases(module: nn.Module) -> None:
    """He-normal convolutions; no bias anywhere."""
    he_convolutions(module)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def he_with_a_small_head(module: nn.Module) -> None:
    """He-normal convolutions, a head of N(0, 0.01^2), no bias anywhere."""
    he_without_biases(module)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
