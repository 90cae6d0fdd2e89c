"""Whether a difference is more than chance, for few samples and many questions at once.

A report has few rounds and many figures. Few rounds need Student's t, whose tails are heavy where
little is known about the spread; many figures need Holm's correction (1979), or one in twenty
would be called a difference though nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mistill.measures.uncertainty import Samples, mean_of, standard_error_of_mean

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)
_RESAMPLES = 200


@dataclass(frozen=True)
class Shift:
    """How far something has moved, and how sure that is.

    Attributes:
        change: New less old.
        error: Standard error of the change.
        freedom: Degrees of freedom of that error; at least 1.
    """

    change: float
    error: float
    freedom: float

    def p_value(self, least: float = 0.0) -> float:
        """How often chance alone moves something so far, if it has not moved more than a little.

        Args:
            least: What is too little to count, 0 or above.

        Returns:
            Probability, at most; of moving by nothing it is two-sided.
        """
        beyond = abs(self.change) - least
        if beyond <= 0:
            return 1.0
        return two_sided(beyond / self.error, self.freedom) if self.error > 0 else 0.0

    def interval(self, confidence: float) -> tuple[float, float]:
        """Where the true change lies.

        Args:
            confidence: Share of such intervals that hold the truth, such as 0.95.

        Returns:
            Lowest and highest change.
        """
        reach = self.error * critical(confidence, self.freedom)
        return self.change - reach, self.change + reach


def two_sided(t: float, freedom: float) -> float:
    """How often the absolute value of Student's t exceeds a number.

    With t = sqrt(v) tan(a) the density is cos(a)^(v - 1), up to a factor that the ratio of two
    integrals is free of.

    Args:
        t: The number, 0 or above.
        freedom: Degrees of freedom v, at least 1.

    Returns:
        Probability.
    """
    angle = math.atan(t / math.sqrt(freedom))
    return _integral(angle, math.pi / 2, freedom) / _integral(0.0, math.pi / 2, freedom)


def _integral(low: float, high: float, freedom: float) -> float:
    """Of cos(a)^(v - 1); a large v has all of its mass near the low end, so the pieces shrink."""
    ends = low + (high - low) * np.array([0, 1e-3, 1e-2, 0.05, 0.2, 0.5, 1])
    half = np.diff(ends)[:, None] / 2
    angles = ends[:-1, None] + half * (1 + _NODES)
    values = np.exp((freedom - 1) * np.log(np.maximum(np.cos(angles), 1e-300)))
    return float((half * values * _WEIGHTS).sum())


def critical(confidence: float, freedom: float) -> float:
    """The number that the absolute value of Student's t seldom exceeds.

    Args:
        confidence: How often it does not, such as 0.95.
        freedom: Degrees of freedom, at least 1.

    Returns:
        The number, such as 12.7 for 0.95 and one degree of freedom.
    """
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > 1 - confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 1 - confidence else (low, middle)
    return high


def between(old: Sequence[float], new: Sequence[float]) -> Shift | None:
    """How far the mean of independent samples has moved (Welch, 1947).

    Args:
        old: Samples of the one.
        new: Samples of the other.

    Returns:
        The shift; None if either is too few to have a spread.
    """
    if min(len(old), len(new)) < 2:
        return None
    change = float(np.mean(new) - np.mean(old))
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (old, new)]
    total = sum(parts)
    if total == 0:
        return Shift(change, 0.0, 1.0)
    shares = sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (old, new), strict=True)
    )
    return Shift(change, math.sqrt(total), total**2 / shares)


def of_mean(old: Samples, new: Samples) -> Shift | None:
    """How far the mean over the same tokens has moved.

    Both models read the same text, so their difference is taken token by token: what makes a
    passage hard for both is gone from it. Its error is taken between passages.

    Args:
        old: One number per token, passage by passage.
        new: The same tokens of the other.

    Returns:
        The shift; None if there is a single passage.
    """
    moved = [
        np.asarray(after, float) - np.asarray(before, float)
        for before, after in zip(old, new, strict=True)
    ]
    error = standard_error_of_mean(moved)
    if len(moved) < 2 or error is None:
        return None
    return Shift(mean_of(moved), error, len(moved) - 1)


def of_tail(old: Samples, new: Samples, share: float = 0.99) -> Shift | None:
    """How far a quantile over the same tokens has moved.

    Its error is that of resampled passages, the same ones of both models (Efron, 1979).

    Args:
        old: One number per token, passage by passage.
        new: The same tokens of the other.
        share: Which quantile.

    Returns:
        The shift; None if there is a single passage.
    """
    if len(old) < 2:
        return None
    random = np.random.default_rng(0)
    pairs = [
        np.stack([np.asarray(before, float), np.asarray(after, float)])
        for before, after in zip(old, new, strict=True)
    ]

    def shift(places: Iterable[int]) -> float:
        before, after = np.quantile(np.concatenate([pairs[p] for p in places], 1), share, axis=1)
        return float(after - before)

    drawn = [shift(random.integers(len(pairs), size=len(pairs))) for _ in range(_RESAMPLES)]
    return Shift(shift(range(len(pairs))), float(np.std(drawn, ddof=1)), len(pairs) - 1)


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which of many differences are real, if one false alarm among all of them is one too many.

    Holm, 1979: the smallest p-value is held against level / n, the next against level / (n - 1),
    and so on until one fails. The chance of any false alarm is at most the level, however the
    questions hang together.

    Args:
        p_values: One per question.
        level: The chance of any false alarm, such as 0.05.

    Returns:
        For each question whether its difference is real.
    """
    found = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] > level / (len(p_values) - rank):
            break
        found[place] = True
    return found
