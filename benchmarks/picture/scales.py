"""The axes of the picture of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.picture.marks import WIDE, Plane

#: A KL divergence below this is rounding of float32 sums, not a difference of models.
NOISE_NATS = 1e-5


@dataclass(frozen=True)
class Scale:
    """An axis: maps values to positions.

    Attributes:
        first: The value at the left or at the top.
        last: The value at the right or at the bottom.
        start: Position of the first, in units of the plane.
        end: Position of the last.
        logarithmic: Whether equal steps are equal ratios.
        ticks: Values with a label.
        zero: Position of values too small to distinguish from 0, on a logarithmic axis.
    """

    first: float
    last: float
    start: float
    end: float
    logarithmic: bool
    ticks: tuple[float, ...]
    zero: float | None = None

    def place(self, value: float) -> float:
        """Position of a value.

        Args:
            value: The value; clipped to the ends of the axis.

        Returns:
            Position in units of the plane.
        """
        if self.zero is not None and value <= NOISE_NATS:
            return self.zero
        clipped = min(max(value, self.first), self.last)
        share = (
            math.log(clipped / self.first) / math.log(self.last / self.first)
            if self.logarithmic
            else (clipped - self.first) / (self.last - self.first)
        )
        return self.start + share * (self.end - self.start)


def speed_scale(speeds: Sequence[float], plane: Plane = WIDE) -> Scale:
    """A logarithmic axis for tokens per second, with margins.

    Args:
        speeds: At least one, above 0.
        plane: Size and margins of the picture.

    Returns:
        The axis, from left to right.
    """
    first, last = min(speeds) / 1.35, max(speeds) * 1.35
    steps = (1, 2, 5) if last / first > 5 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    return Scale(
        first=first,
        last=last,
        start=plane.left,
        end=plane.right,
        logarithmic=True,
        ticks=tuple(tick for tick in _decades(first, last, steps) if first <= tick <= last),
    )


def divergence_scale(divergences: Sequence[float], plane: Plane = WIDE) -> Scale:
    """An axis for divergences, 0 at the top.

    Linear where all values other than 0 have the same order of magnitude, else logarithmic with a
    line of its own for 0.

    Args:
        divergences: At least one, in nats.
        plane: Size and margins of the picture.

    Returns:
        The axis, from top to bottom.
    """
    upper, lower, room = plane.top + plane.room, plane.bottom - plane.room, plane.room
    real = [value for value in divergences if value > NOISE_NATS]
    if not real or max(real) / min(real) < 20:
        last = 1.05 * max(real, default=1.0)
        step = _round_step(last / 5)
        ticks = tuple(step * count for count in range(math.floor(last / step) + 1))
        return Scale(0.0, last, upper, lower, False, ticks)
    first, last = min(real) / 1.2, max(real) * 1.2
    ticks = tuple(tick for tick in _decades(first, last, (1,)) if first <= tick <= last)
    if len(ticks) < 3:
        ticks = tuple(t for t in _decades(first, last, (1, 2, 5)) if first <= t <= last)
    has_zero = any(value <= NOISE_NATS for value in divergences)
    zero = upper if has_zero else None
    start = upper + room if has_zero else upper
    return Scale(first, last, start, lower, True, ticks, zero)


def _decades(first: float, last: float, steps: Sequence[float]) -> list[float]:
    low, high = math.floor(math.log10(first)), math.ceil(math.log10(last))
    return [
        float(f"{step * 10.0**exponent:.6g}") for exponent in range(low, high + 1) for step in steps
    ]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
