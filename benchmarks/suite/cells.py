"""What tables are made of: numbers as text, and rows as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.figures.column import significant

Found = Mapping[str, Any]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column names things and whose others hold numbers.

    Args:
        heads: One for each column; the first may be empty.
        rows: Cells, as many as heads.

    Returns:
        Lines of Markdown.
    """
    lines = [_line(heads), f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in rows:
        assert len(row) == len(heads), f"{len(row)} cells under {len(heads)} heads"
        lines.append(_line(row))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def number(value: float | None, digits: int = 3) -> str:
    """A number as a table shows it.

    Args:
        value: The number; None where there is none.
        digits: Significant digits, if it is not larger than that.

    Returns:
        Text; empty where there is none.
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else significant(value, digits)


def spread(figure: Found, digits: int = 3) -> str:
    """A median with the lowest and the highest of its turns.

    Args:
        figure: ``median``, ``lowest`` and ``highest``.
        digits: Significant digits.

    Returns:
        Such as ``0.72 (0.70 to 0.75)``.
    """
    low, high = number(figure["lowest"], digits), number(figure["highest"], digits)
    return f"{number(figure['median'], digits)} ({low} to {high})"


def with_error(value: float, error: float | None) -> str:
    """A figure with its standard error.

    Args:
        value: The figure.
        error: Its standard error; None where it is not known.

    Returns:
        Such as ``0.121 \u00b1 0.004``.
    """
    return number(value) if error is None else f"{number(value)} \u00b1 {significant(error, 1)}"


def value_range(values: Sequence[float], digits: int = 3) -> str:
    """The least and the greatest of several figures.

    Args:
        values: The figures.
        digits: Significant digits.

    Returns:
        Such as ``0.117 to 0.125``; one number where they look alike.
    """
    low, high = number(min(values), digits), number(max(values), digits)
    return low if low == high else f"{low} to {high}"
