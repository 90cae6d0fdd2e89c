"""Confidence intervals of a share, such as the share of answers that are right.

Wilson's interval (1927) covers the true share as often as it says near 0 and 1 too, where plus and
minus two standard errors does not. Tokens of one passage resemble each other, so the effective
number of observations is smaller than the number of tokens. As for surveys (Korn and Graubard,
1998), the interval is computed for the number of independent tokens that would have the standard
error estimated between passages (``mistill.measures.uncertainty``), and with Student's t, with one
degree of freedom less than there are passages, in place of the normal distribution.
``scipy.stats.binomtest`` has Wilson's interval for whole counts and the normal distribution only,
so its formula stands here.
"""

from __future__ import annotations

import math

from mistill.measures.significance import critical
from mistill.measures.uncertainty import Samples, mean_of, standard_error_of_mean

CONFIDENCE = 0.95
#: Standard errors of a normal distribution within which 95% lie.
NORMAL = 1.959963984540054


def clustered_interval(samples: Samples) -> tuple[float, float]:
    """The 95% confidence interval of a share over tokens, passage by passage.

    Where all tokens are 1, or all are 0, nothing is known of how they resemble each other, and
    they are taken for independent.

    Args:
        samples: 1 or 0 for each token, passage by passage.

    Returns:
        Lowest and highest share.
    """
    share, error = mean_of(samples), standard_error_of_mean(samples)
    tokens = sum(len(passage) for passage in samples)
    independent = share * (1 - share) / error**2 if error else float(tokens)
    distance = critical(CONFIDENCE, len(samples) - 1) if len(samples) > 1 else NORMAL
    return _wilson(share, min(independent, tokens), distance)


def simple_interval(right: int, asked: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of independent questions.

    Args:
        right: Number of right answers.
        asked: Number of questions, at least 1.

    Returns:
        Lowest and highest share.
    """
    return _wilson(right / asked, asked, NORMAL)


def _wilson(share: float, count: float, distance: float) -> tuple[float, float]:
    """Shares of which the observed one is at most ``distance`` standard errors away."""
    square = distance**2 / count
    middle = (share + square / 2) / (1 + square)
    reach = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)
