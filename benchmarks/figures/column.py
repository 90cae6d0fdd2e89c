"""A figure of every model: its unit, its meaning and its way of being written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from benchmarks.figures.model_result import ModelResult

MEGABYTE = 1e6
EN_DASH = "\u2013"

#: What a figure depends on besides the model: nothing, a clock or the memory of one machine, the
#: text, or the text and the reference.
Nature = Literal["bytes", "clock", "memory", "text", "reference"]
Rounds = Sequence[float]
Passages = Sequence[Sequence[float]]

P = TypeVar("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of every model.

    Attributes:
        key: Its name in the JSON summary, with the unit.
        title: Its name for people.
        unit: Its unit for people; may be empty.
        meaning: What it is, in a sentence.
        figure: Takes it from a result; None where the model has none.
        write: Turns the figure into text.
        better: Which end is the better one.
        spread: How far it may be off: plus and minus, or the quartiles; None where unknown.
        compact: Whether it is also shown where room is short.
        nature: What it depends on besides the model; decides when two reports can be compared.
        samples: What it was derived from: one number per round of a figure of a clock, or one per
            token, passage by passage, of a figure of text; None where nothing was kept.
        tail: Whether it is the 99th percentile of those samples, not their mean.
        logarithmic: Whether those samples are of its logarithm.
        asked: A name for what the model was asked, where that is not the text of the report; None
            where it is, or where it was not asked.
    """

    key: str
    title: str
    unit: str
    meaning: str
    figure: Callable[[ModelResult], float | None]
    write: Callable[[float], str]
    better: Literal["lower", "higher"]
    spread: Callable[[ModelResult], float | tuple[float, float] | None] = lambda _: None
    compact: bool = True
    nature: Nature
    samples: Callable[[ModelResult], Rounds | Passages | None] = lambda _: None
    tail: bool = False
    logarithmic: bool = False
    asked: Callable[[ModelResult], str | None] = lambda _: None

    def text(self, model: ModelResult) -> str:
        """The figure of one model.

        Args:
            model: The result.

        Returns:
            Text; a dash where there is no figure.
        """
        value = self.figure(model)
        return EN_DASH if value is None else self.write(value)

    def spread_text(self, model: ModelResult) -> str:
        """How far the figure of one model may be off.

        Args:
            model: The result.

        Returns:
            ``± 0.12`` or ``41 to 44`` with a dash; empty where nothing is known.
        """
        spread = self.spread(model)
        if spread is None:
            return ""
        if isinstance(spread, tuple):
            return EN_DASH.join(map(self.write, spread))
        return f"± {significant(spread, 2)}"


def taken(
    find: Callable[[ModelResult], P | None], take: Callable[[P], T]
) -> Callable[[ModelResult], T | None]:
    """What is taken from a part of a result.

    Args:
        find: Finds the part, such as the distance from the reference.
        take: Takes something from the part.

    Returns:
        Takes it from a result; None where there is no such part.
    """

    def of(model: ModelResult) -> T | None:
        part = find(model)
        return None if part is None else take(part)

    return of


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it can be avoided.

    Args:
        value: The number.
        digits: Digits to keep.

    Returns:
        Text such as ``0.00312``, ``17.4`` or ``1,234``.
    """
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number
    if exponent < -5:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def rate(value: float) -> str:
    """A number of which three digits are enough.

    Args:
        value: The number.

    Returns:
        Text such as ``17.4`` or ``1,234``.
    """
    return f"{value:,.0f}" if value >= 100 else significant(value)


def whole(value: float) -> str:
    """A number without decimals.

    Args:
        value: The number.

    Returns:
        Text such as ``1,234``.
    """
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A share in per cent.

    Args:
        value: The share.

    Returns:
        Text such as ``97.3``.
    """
    return f"{value * 100:.1f}"
