"""Whether a difference is significant, with few samples and many figures tested at once.

A report has few rounds and many figures. With few rounds the standard error is itself uncertain,
which Student's t accounts for; with many figures Holm's correction (1979) is needed, or one in
twenty would be called different though nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mistill.errors import missing_extra
from mistill.measures.uncertainty import Samples, mean_of, standard_error_of_mean

_RESAMPLES = 200


@dataclass(frozen=True)
class Shift:
    """A change of a figure, with its standard error.

    Attributes:
        change: New less old.
        error: Standard error of the change.
        freedom: Degrees of freedom of that error; at least 1.
    """

    change: float
    error: float
    freedom: float

    def p_value(self, least: float = 0.0) -> float:
        """Probability of a change this large if the true one is at most ``least`` in size.

        Args:
            least: Largest change that does not count as one, 0 or above.

        Returns:
            An upper bound of the probability; for a ``least`` of 0 the two-sided p-value.
        """
        beyond = abs(self.change) - least
        if beyond <= 0:
            return 1.0
        return two_sided(beyond / self.error, self.freedom) if self.error > 0 else 0.0

    def interval(self, confidence: float) -> tuple[float, float]:
        """Confidence interval of the change.

        Args:
            confidence: Share of such intervals that contain the true change, such as 0.95.

        Returns:
            Lowest and highest change.
        """
        reach = self.error * critical(confidence, self.freedom)
        return self.change - reach, self.change + reach


def students_t() -> Any:
    """Student's t distribution, from scipy, which is imported only where it is needed.

    Returns:
        ``scipy.stats.t``.

    Raises:
        MissingExtraError: If scipy is not installed.
    """
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        raise missing_extra("scipy", "compress") from error
    return t


def two_sided(t: float, freedom: float) -> float:
    """Probability that the absolute value of Student's t exceeds a number.

    Args:
        t: The number, 0 or above.
        freedom: Degrees of freedom, at least 1.

    Returns:
        Probability.
    """
    return float(2 * students_t().sf(t, freedom))


def critical(confidence: float, freedom: float) -> float:
    """The number that the absolute value of Student's t stays below with some probability.

    Args:
        confidence: That probability, such as 0.95.
        freedom: Degrees of freedom, at least 1.

    Returns:
        The number, such as 12.7 for 0.95 and one degree of freedom.
    """
    return float(students_t().ppf((1 + confidence) / 2, freedom))


def between(old: Sequence[float], new: Sequence[float]) -> Shift | None:
    """Difference of the means of independent samples (Welch, 1947).

    Args:
        old: Samples before the change.
        new: Samples after it.

    Returns:
        The shift; None if there are fewer than two samples of either.
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
    """Difference of the means over the same tokens.

    Both models read the same text, so the difference is taken token by token, which removes what
    makes a passage hard for both. Its standard error is estimated between passages.

    Args:
        old: One number per token, passage by passage.
        new: The numbers of the other model for the same tokens.

    Returns:
        The shift; None if there is a single passage.
    """
    differences = [
        np.asarray(after, float) - np.asarray(before, float)
        for before, after in zip(old, new, strict=True)
    ]
    error = standard_error_of_mean(differences)
    if len(differences) < 2 or error is None:
        return None
    return Shift(mean_of(differences), error, len(differences) - 1)


def of_tail(old: Samples, new: Samples, share: float = 0.99) -> Shift | None:
    """Difference of a quantile over the same tokens.

    Its standard error comes from resampling passages (Efron, 1979), each time the same passages of
    both models.

    Args:
        old: One number per token, passage by passage.
        new: The numbers of the other model for the same tokens.
        share: Which quantile, such as 0.99.

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

    resampled = [shift(random.integers(len(pairs), size=len(pairs))) for _ in range(_RESAMPLES)]
    return Shift(shift(range(len(pairs))), float(np.std(resampled, ddof=1)), len(pairs) - 1)


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which of many differences are significant, all tested together (Holm, 1979).

    The smallest p-value is compared with level / n, the next with level / (n - 1), and so on until
    one is larger. The probability of any false positive is then at most the level, whether the
    tests are independent or not.

    Args:
        p_values: One per test.
        level: Probability of any false positive, such as 0.05.

    Returns:
        For each test whether its difference is significant.
    """
    significant = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] > level / (len(p_values) - rank):
            break
        significant[place] = True
    return significant
