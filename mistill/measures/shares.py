"""Where the true value of a share lies, such as the share of answers that are right.

Wilson's interval (1927) keeps its word near 0 and 1, where plus and minus a standard error does
not. Tokens of one passage resemble each other, so that there are fewer independent ones than there
are tokens. As surveys do (Korn and Graubard, 1998), the number of tokens is replaced by that of
independent ones which would have the standard error found between passages
(``mistill.measures.uncertainty``), and the normal distribution by Student's t, with one degree of
freedom less than there are passages.
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

    Where all tokens agree nothing is known of how they resemble each other, and they are taken for
    independent.

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
        right: How many were answered rightly.
        asked: How many there were, at least 1.

    Returns:
        Lowest and highest share.
    """
    return _wilson(right / asked, asked, NORMAL)


def _wilson(share: float, count: float, distance: float) -> tuple[float, float]:
    """Shares from which the one found is no further than so many standard errors."""
    square = distance**2 / count
    middle = (share + square / 2) / (1 + square)
    reach = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)
