"""The losses of preferences, from log-probabilities of whole answers.

They are what TRL's trainers minimise, written out for evaluation, where every answer counts once
whatever batch it would stand in. The log ratio of an answer y to a prompt x is
log pi(y|x) - log pi_ref(y|x), in nats, summed over the answer's tokens.

N is pairs or answers.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_sigmoid(values: Array) -> Array:
    """log(1 / (1 + exp(-x))), without overflow."""
    return -np.logaddexp(0.0, -values)


def pair_losses(
    loss: str,
    chosen: Array,
    rejected: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    *,
    beta: float,
    smoothing: float = 0.0,
) -> Array:
    """The loss of each pair.

    ``sigmoid`` is DPO (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, equation 7);
    ``sigmoid_norm`` the same on log ratios per token; ``ipo`` the squared loss of Azar et al.
    (2023, https://arxiv.org/abs/2310.12036, equation 17) on log ratios per token, as its authors
    compute it; ``robust`` the loss of Chowdhury et al. (2024, https://arxiv.org/abs/2403.00409)
    where a share ``smoothing`` of the labels is wrong.

    Args:
        loss: sigmoid, sigmoid_norm, ipo or robust.
        chosen: Log ratios of the better answers, shape (N,).
        rejected: Log ratios of the others, shape (N,).
        chosen_lengths: Tokens of the better answers, shape (N,).
        rejected_lengths: Tokens of the others, shape (N,).
        beta: Weight of the reference; tau of ipo.
        smoothing: For robust, from 0 to below 0.5.

    Returns:
        Shape (N,).
    """
    margins = chosen - rejected
    per_token = chosen / chosen_lengths - rejected / rejected_lengths
    if loss == "ipo":
        return np.asarray((per_token - 1 / (2 * beta)) ** 2)
    if loss == "sigmoid_norm":
        return -log_sigmoid(beta * per_token)
    if loss == "robust":
        right, wrong = log_sigmoid(beta * margins), log_sigmoid(-beta * margins)
        return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)
    return -log_sigmoid(beta * margins)


def label_losses(
    ratios: Array, good: NDArray[np.bool_], *, beta: float, good_weight: float, bad_weight: float
) -> Array:
    """The loss of each labelled answer where the KL divergence from the reference is taken for 0.

    KTO (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306, equation 7) with z_0 = 0: its
    estimate depends on which answers share a batch, and an evaluation has no batches.

    Args:
        ratios: Log ratios of the answers, shape (N,).
        good: Whether each is wanted, shape (N,).
        beta: Weight of the reference.
        good_weight: Weight of those that are wanted.
        bad_weight: Weight of the others.

    Returns:
        Shape (N,).
    """
    signed = np.where(good, ratios, -ratios)
    weights = np.where(good, good_weight, bad_weight)
    return np.asarray(weights * (1 - np.exp(log_sigmoid(beta * signed))))


def odds_losses(
    chosen: Array, rejected: Array, chosen_lengths: Array, rejected_lengths: Array, *, beta: float
) -> Array:
    """The loss of each pair without a reference.

    ORPO (Hong et al., 2024, https://arxiv.org/abs/2403.07691, equations 4 to 7): the cross-entropy
    of the better answer, and the log odds ratio of the two, on log-probabilities per token.

    Args:
        chosen: Log-probabilities of the better answers, shape (N,).
        rejected: Log-probabilities of the others, shape (N,).
        chosen_lengths: Tokens of the better answers, shape (N,).
        rejected_lengths: Tokens of the others, shape (N,).
        beta: Weight of the odds ratio.

    Returns:
        Shape (N,).
    """
    better, worse = chosen / chosen_lengths, rejected / rejected_lengths
    odds = (better - np.log(-np.expm1(better))) - (worse - np.log(-np.expm1(worse)))
    return -better - beta * log_sigmoid(odds)


def first_loss(loss: str, beta: float) -> float | None:
    """The loss of a model that is its own reference.

    Args:
        loss: As the settings name it.
        beta: As the settings have it.

    Returns:
        ln 2 where only the difference of two log ratios counts; None where it depends on more.
    """
    if loss in ("sigmoid", "sigmoid_norm", "robust"):
        return math.log(2)
    return 1 / (4 * beta**2) if loss == "ipo" else None
