"""Random numbers without state: each is a hash of what it is for.

A generator's numbers depend on how many were drawn before; these do not, so a sample is augmented alike in whatever
batch, order or process it meets, on the CPU and on a GPU, and a resume needs no state.
"""

from __future__ import annotations

from torch import Tensor

from ..seeds import derive

GOLDEN = 0x9E3779B97F4A7C15  # splitmix64 (Steele, Lea, Flood 2014): increment and the two multipliers of its finaliser
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Random:
    """Per-sample random numbers, a pure function of (seed, sample, epoch, lane).

    Args:
        seed: of the run, for this purpose.
        index: [B], int64, the samples; numbers come out on its device, in its order.
        epoch: gives a sample new numbers every epoch.
    """

    def __init__(self, seed: int, index: Tensor, epoch: int) -> None:
        self.seed, self.index, self.epoch = seed, index, epoch

    def uniform(self, lane: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[B] float32 in [low, high), a multiple of 2^-24 of the range.

        Args:
            lane: names the draw; one lane gives one number a sample, so use a lane for each number.
            low: the smallest value.
            high: the bound.
        """
        unit = _shift_right(self._bits(lane), 40).float() * 2.0**-24
        return unit * (high - low) + low

    def integers(self, lane: str, low: int, high: int) -> Tensor:
        """[B] int64 in [low, high); high - low at most 2^31.

        Raises:
            ValueError: the range is empty or too wide.
        """
        span = high - low
        if not 0 < span <= 2**31:
            raise ValueError(f"integers({lane!r}, {low}, {high}): the range must hold 1 to 2^31 values")
        # high bits times span: no modulo, and a bias below span / 2^32
        return ((_shift_right(self._bits(lane), 32) * span) >> 32) + low

    def _bits(self, lane: str) -> Tensor:
        key = derive(self.seed, lane, self.epoch)  # sha256 on the host: lanes and epochs are unrelated streams
        return _mix(self.index * _signed(GOLDEN) + key)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 [B]; products wrap around as unsigned ones would."""
    x = (x ^ _shift_right(x, 30)) * _signed(FIRST)
    x = (x ^ _shift_right(x, 27)) * _signed(SECOND)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift copies the sign; the mask clears it


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
