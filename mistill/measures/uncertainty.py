"""Standard errors of means over tokens.

Tokens of one passage resemble each other: a passage on a hard subject is hard throughout. Taking
every token for an independent observation would make intervals too narrow. Passages are nearly
independent, so the variance is estimated between passages, as survey statistics do for clusters of
unequal size (Cochran, Sampling Techniques, 3rd edition, section 6.4: the ratio estimator).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Samples = Sequence[Sequence[float]] | Sequence[NDArray[np.float64]]


def mean_of(samples: Samples) -> float:
    """Mean over all tokens of all passages.

    Args:
        samples: One number per token, passage by passage.

    Returns:
        The mean; every token weighs the same.
    """
    return float(np.concatenate([np.asarray(passage, float) for passage in samples]).mean())


def standard_error_of_mean(samples: Samples) -> float | None:
    """Standard error of the mean over tokens.

    With P passages, passage p holding n_p tokens that sum to s_p, and m the mean over all N
    tokens, the variance of m is P / (P - 1) * sum((s_p - m n_p)^2) / N^2. With a single passage
    the tokens are taken as independent, which gives too small an error.

    Args:
        samples: One number per token, passage by passage.

    Returns:
        The standard error; None if there is a single token.
    """
    sums = [float(np.sum(passage, dtype=float)) for passage in samples]
    counts = [len(passage) for passage in samples]
    if len(counts) > 1:
        return ratio_standard_error(sums, counts)
    if counts[0] > 1:
        return float(np.std(samples[0], ddof=1) / np.sqrt(counts[0]))
    return None


def ratio_standard_error(sums: Sequence[float], weights: Sequence[float]) -> float | None:
    """Standard error of a ratio of two sums over passages.

    With P passages, sums s_p, weights w_p that add up to W, and r their ratio, the variance of r
    is P / (P - 1) * sum((s_p - r w_p)^2) / W^2.

    Args:
        sums: The numerator's part of each passage, such as its loss.
        weights: The denominator's part of each passage, such as its tokens.

    Returns:
        The standard error; None for a single passage.
    """
    if len(sums) < 2:
        return None
    numerators, denominators = np.asarray(sums, float), np.asarray(weights, float)
    ratio = numerators.sum() / denominators.sum()
    between = np.square(numerators - ratio * denominators).sum()
    passages = len(numerators)
    return float(np.sqrt(passages / (passages - 1) * between) / denominators.sum())


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated linearly.

    Args:
        values: At least one number.

    Returns:
        Lower quartile, median, upper quartile.
    """
    low, middle, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)
