"""How far a mean over tokens may be from the one that more text would give.

Tokens of one passage resemble each other: a passage on a hard subject is hard throughout. Taking
every token for an independent observation makes intervals too narrow. Passages are nearly
independent, so the spread is taken between passages, as survey statistics do for clusters of
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
    the tokens are taken as independent, which is too optimistic but all that can be said.

    Args:
        samples: One number per token, passage by passage.

    Returns:
        The standard error; None if there is a single token.
    """
    sums = np.array([np.sum(passage, dtype=float) for passage in samples])
    counts = np.array([len(passage) for passage in samples])
    passages, tokens = len(counts), counts.sum()
    mean = sums.sum() / tokens
    if passages > 1:
        between = np.square(sums - mean * counts).sum()
        return float(np.sqrt(passages / (passages - 1) * between) / tokens)
    if tokens > 1:
        return float(np.std(samples[0], ddof=1) / np.sqrt(tokens))
    return None


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated linearly.

    Args:
        values: At least one number.

    Returns:
        The three, in order.
    """
    low, middle, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)
