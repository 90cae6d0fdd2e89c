"""How close a model's predictions are to those of the reference.

Perplexity can stay the same while predictions change, some for the better and some for the worse;
KL(reference || model) cannot. It is computed over the whole vocabulary at every token, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mistill.engine.log_probabilities import row_blocks
from mistill.measures.shares import clustered_interval
from mistill.measures.uncertainty import mean_of, standard_error_of_mean


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How one model differs from the reference at every token of the text.

    Attributes:
        divergences: KL(reference || model) at each token, in nats, passage by passage.
        agreements: 1 where the most probable token of both models is the same, else 0.
    """

    divergences: tuple[tuple[float, ...], ...]
    agreements: tuple[tuple[int, ...], ...]

    @property
    def mean_kl(self) -> float:
        """Mean divergence per token, in nats."""
        return mean_of(self.divergences)

    @property
    def kl_standard_error(self) -> float | None:
        """Standard error of the mean divergence, taken between passages."""
        return standard_error_of_mean(self.divergences)

    @property
    def kl_99th_percentile(self) -> float:
        """The divergence that one token in a hundred exceeds."""
        return float(np.quantile(np.concatenate(self.divergences), 0.99))

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both models' most probable token is the same, from 0 to 1."""
        return mean_of(self.agreements)

    @property
    def agreement_interval(self) -> tuple[float, float]:
        """95% confidence interval of the agreement (``mistill.measures.shares``)."""
        return clustered_interval(self.agreements)


def divergences(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference || model) at each position, in nats.

    With p the reference's distribution, r and c the two models' logits and Z their normalizers,
    it is sum(p (r - c)) - ln Z_r + ln Z_c. The difference of logits is taken first, and the sums
    in float64, so that two models that nearly agree keep their digits; two that agree give 0.

    Args:
        reference: Logits of the reference, shape (T, V).
        logits: Logits of the model, shape (T, V).

    Returns:
        Shape (T,), never below 0.
    """
    result = np.empty(len(logits), np.float64)
    for rows in row_blocks(*logits.shape):
        r, c = np.asarray(reference[rows]), logits[rows]
        r_top, c_top = r.max(axis=1, keepdims=True), c.max(axis=1, keepdims=True)
        r_weights = np.exp(r - r_top)
        r_total = r_weights.sum(axis=1, dtype=np.float64)
        c_total = np.exp(c - c_top).sum(axis=1, dtype=np.float64)
        expected = (r_weights * (r - c)).sum(axis=1, dtype=np.float64) / r_total
        shift = (r_top - c_top)[:, 0].astype(np.float64)
        result[rows] = expected - shift - np.log(r_total) + np.log(c_total)
    # Rounding can leave a few 1e-8 below zero where the models agree.
    return np.maximum(result, 0.0)


def agreements(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether the most probable token of two models is the same.

    Args:
        reference: Logits of the reference, shape (T, V).
        logits: Logits of the model, shape (T, V).

    Returns:
        Shape (T,).
    """
    return np.asarray(reference.argmax(axis=1) == logits.argmax(axis=1))
