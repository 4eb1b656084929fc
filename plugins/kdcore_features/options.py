"""Options of the losses, without torch, so that a recipe is checked quickly."""

from __future__ import annotations

from kdcore import Field, Options

TAPS = 'a list of taps such as ["stage?"] or ["stage2", "stage3"]'


class TapOptions(Options):
    """Which features are compared, from the deepest stage on, one by one."""

    student: tuple[str, ...] = Field(("stage?",), min_length=1, description=TAPS)
    teacher: tuple[str, ...] = Field(("stage?",), min_length=1, description=TAPS)
