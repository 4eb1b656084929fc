"""Which back ends there are, and the choice among them."""

from __future__ import annotations

from typing import Literal, get_args

Backend = Literal["auto", "reference", "cpu", "cuda"]


def available_backends() -> tuple[str, ...]:
    """The back ends that work in this installation, best first."""
    return ("reference",)


def choose_backend(backend: str) -> str:
    """Gives the back end's name, with "auto" resolved.

    Raises:
        ValueError: no back end has that name.
        RuntimeError: it exists but is not in this installation.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is unknown. Use one of {', '.join(get_args(Backend))}.")
    available = available_backends()
    if backend == "auto":
        return available[0]
    if backend not in available:
        raise RuntimeError(
            f"backend={backend!r} needs the compiled op, which this installation of kdcore does not have. "
            f'Use backend="auto" or one of {", ".join(available)}: they compute the same loss in plain torch.'
        )
    return backend
