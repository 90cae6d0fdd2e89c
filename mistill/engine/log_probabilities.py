"""Log-probabilities of the tokens that a model wrote, and of the most probable ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistill.engine.language_model import Choose
from mistill.settings import require

_ELEMENTS_AT_ONCE = 1 << 19  # 2 MiB of float32: a few rows of logits that stay in the cache


class TokenScore(NamedTuple):
    """A token that was written.

    Attributes:
        token: Id of the token.
        log_probability: Natural logarithm of its probability among all tokens, at temperature 1:
            what the model says, not what sampling made of it.
        top: The most probable tokens, most probable first, each with its own.
    """

    token: int
    log_probability: float
    top: tuple[tuple[int, float], ...]


def token_score(
    logits: NDArray[np.float32], token: int, top: int = 0, normalizer: float | None = None
) -> TokenScore:
    """How probable a token is.

    Args:
        logits: Shape (V,).
        token: Id of the token.
        top: Number of most probable tokens that are listed too.
        normalizer: From ``log_normalizers``, where it is known already.

    Returns:
        Its log-probability, and theirs.
    """
    if normalizer is None:
        # In float64 and with the largest subtracted, so that no exponential overflows.
        largest = float(logits.max())
        total = np.exp(logits.astype(np.float64) - largest).sum()
        normalizer = largest + float(np.log(total))
    count = min(top, logits.size)
    best = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, np.int64)
    # Equal logits are in the order of the ids.
    best = best[np.lexsort((best, -logits[best]))]
    return TokenScore(
        token,
        float(logits[token]) - normalizer,
        tuple((int(other), float(logits[other]) - normalizer) for other in best),
    )


class Scored:
    """Wraps a function that picks tokens, and records the probability of each token.

    Attributes:
        scores: One for each token chosen so far.
    """

    scores: list[TokenScore]

    def __init__(self, choose: Choose, top: int = 0) -> None:
        """Wrap a function.

        Args:
            choose: Function that picks the tokens.
            top: Number of most probable tokens that are listed at each position.
        """
        require(top >= 0, f"top must be 0 or more, not {top}")
        self.scores = []
        self._choose = choose
        self._top = top

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token.

        Args:
            logits: Shape (V,).

        Returns:
            Its id.
        """
        token = self._choose(logits)
        self.scores.append(token_score(logits, token, self._top))
        return token


def log_normalizers(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log of the sum of the exponentials of each row.

    Args:
        logits: Shape (T, V).

    Returns:
        Shape (T,).
    """
    normalizers = np.empty(len(logits), np.float64)
    for rows in row_blocks(*logits.shape):
        largest = logits[rows].max(axis=1, keepdims=True)
        total = np.exp(logits[rows] - largest).sum(axis=1, dtype=np.float64)
        normalizers[rows] = largest[:, 0] + np.log(total)
    return normalizers


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Cut a matrix into blocks of rows that fit a processor's cache.

    Args:
        rows: Number of rows.
        width: Number of columns.

    Yields:
        Slices of rows, in order.
    """
    step = max(1, _ELEMENTS_AT_ONCE // width)
    for start in range(0, rows, step):
        yield slice(start, start + step)
