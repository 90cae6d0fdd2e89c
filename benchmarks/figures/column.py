"""A figure of every model: its unit, its meaning and its format."""

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
        figure: Computes it from a result; None where the model has none.
        write: Formats the figure as text.
        better: Whether a lower or a higher figure is better.
        spread: Its uncertainty: standard error, or ends of an interval; None where unknown.
        compact: Whether it is also shown in the terminal's table.
        nature: What it depends on besides the model; decides when two reports can be compared.
        samples: The samples it is computed from: one number per round for a time or speed, or one
            per token, passage by passage, for a figure of text; None where they are not known.
        tail: Whether it is the 99th percentile of those samples, not their mean.
        logarithmic: Whether the samples are of the figure's logarithm.
        text_fingerprint: Of what the model read for this figure, where that is not the text of the
            report; None where it is, or where the model has no such figure.
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
    text_fingerprint: Callable[[ModelResult], str | None] = lambda _: None

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
        """The uncertainty of the figure of one model.

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


def of_part(
    find: Callable[[ModelResult], P | None], take: Callable[[P], T]
) -> Callable[[ModelResult], T | None]:
    """A function of a part of a result, which a result may lack.

    Args:
        find: Gives the part, such as the distance from the reference, or None.
        take: Computes something from the part.

    Returns:
        The function of a result; None where the part is missing.
    """

    def of(model: ModelResult) -> T | None:
        part = find(model)
        return None if part is None else take(part)

    return of


def significant(value: float, digits: int = 3) -> str:
    """A number with a number of significant digits, without an exponent if possible.

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
    """A number with three digits.

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
