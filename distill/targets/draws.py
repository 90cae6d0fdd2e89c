"""A few tokens that stand for a teacher's whole distribution.

What is drawn at random from a distribution p has p as its mean, so that a student who learns from
draws learns, on average, what it would have learnt from p (random sampling knowledge
distillation; Anshumann et al., 2025, section 3, https://arxiv.org/abs/2503.16870). Draws that
are spread evenly vary less than independent ones: systematic resampling takes the N points
(u + i) / N, i = 0 .. N-1, of the cumulative distribution with one uniform number u, after which a
token of probability p was drawn floor(N p) or ceil(N p) times, and N p times on average (Douc et
al., 2005, https://arxiv.org/abs/cs/0507025). The count of each token varies less; that of a group
of tokens may, in contrived orders, vary more.

n is rows, V vocabulary, N draws, K different tokens of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniform_numbers(key: bytes, seed: int, positions: int, each: int) -> NDArray[np.float64]:
    """Random numbers that depend on a piece of text and a seed, and on nothing else.

    Args:
        key: 16 bytes that name the piece.
        seed: Of the whole folder.
        positions: Rows, n.
        each: Numbers in a row.

    Returns:
        At least 0 and below 1, shape (n, each); the first rows are the same for any ``positions``.
    """
    words = int.from_bytes(key, "little") ^ seed
    # The stream of Philox is fixed for all versions of numpy; that of its generators is not.
    raw = np.random.Philox(key=words % 2**128).random_raw(positions * each)
    numbers: NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers.reshape(positions, each)


def systematic_heights(u: Tensor, draws: int) -> Tensor:
    """Evenly spaced heights of a cumulative distribution.

    Args:
        u: One uniform number a row, float64, shape (n, 1).
        draws: N.

    Returns:
        Rising rows, shape (n, N).
    """
    return (u + torch.arange(draws, dtype=u.dtype, device=u.device)) / draws


def multinomial_heights(u: Tensor) -> Tensor:
    """Independent heights of a cumulative distribution.

    Args:
        u: N uniform numbers a row, float64, shape (n, N).

    Returns:
        The same, each row in rising order.
    """
    return u.sort(dim=-1).values


def draw(probabilities: Tensor, heights: Tensor) -> Tensor:
    """The tokens at some heights of the cumulative distribution.

    Args:
        probabilities: Shape (n, V); a row need not sum to 1 exactly.
        heights: Float64, shape (n, N), each row in rising order, at least 0 and at most 1.

    Returns:
        Token ids, shape (n, N), each row in rising order; never one of probability 0.
    """
    # In float32 the smallest probabilities would vanish beside a sum close to 1.
    heaped = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = heaped[:, -1:].contiguous()
    ids = torch.searchsorted(heaped, heights * total, right=True)
    last = torch.searchsorted(heaped, total)
    return torch.minimum(ids, last)


def entropy(log_probabilities: Tensor, probabilities: Tensor) -> Tensor:
    """How uncertain the distributions are.

    Args:
        log_probabilities: Shape (n, V); overwritten.
        probabilities: Their exp.

    Returns:
        In nats, shape (n,).
    """
    # A token that cannot be has the logarithm -inf, and 0 * -inf is not a number.
    terms = log_probabilities.clamp_(min=torch.finfo(log_probabilities.dtype).min)
    return terms.mul_(probabilities).sum(dim=-1).neg_().clamp_(min=0)
