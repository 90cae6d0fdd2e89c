"""Perplexity of a model on a text.

T is positions, V vocabulary. Logits stay float32; every sum over the vocabulary is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mistill.engine.log_probabilities import log_normalizers
from mistill.measures.uncertainty import mean_of, ratio_standard_error, standard_error_of_mean


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The loss of one model at every token that it had to predict.

    Attributes:
        losses: Negative log-probability of each token, in nats, passage by passage.
        passage_bytes: Bytes of text that the predicted tokens of each passage spell; special
            tokens, such as the end of a turn, spell none. Empty in old reports.
    """

    losses: tuple[tuple[float, ...], ...]
    passage_bytes: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(map(len, self.losses))

    @property
    def mean_loss(self) -> float:
        """Mean negative log-probability per token, in nats."""
        return mean_of(self.losses)

    @property
    def value(self) -> float:
        """The perplexity: e to the mean loss."""
        return math.exp(self.mean_loss)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the perplexity, by the delta method.

        The derivative of e^m is e^m, so it is the perplexity times the standard error of the mean
        loss, which is taken between passages (``mistill.measures.uncertainty``).
        """
        error = standard_error_of_mean(self.losses)
        return None if error is None else self.value * error

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to predict a byte of the text; None where its bytes are not known.

        Perplexity is per token, and a vocabulary with longer tokens has fewer of them; this can
        be compared between vocabularies.
        """
        if not sum(self.passage_bytes):
            return None
        return sum(map(sum, self.losses)) / math.log(2) / sum(self.passage_bytes)

    @property
    def bits_per_byte_standard_error(self) -> float | None:
        """Standard error of the bits per byte, taken between passages; None for a single one."""
        if not sum(self.passage_bytes):
            return None
        error = ratio_standard_error([sum(passage) for passage in self.losses], self.passage_bytes)
        return None if error is None else error / math.log(2)


def token_losses(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-probability of the token that came next, in nats.

    Args:
        logits: Shape (T, V).
        targets: Shape (T,), the tokens that came next.

    Returns:
        Shape (T,).
    """
    target_logits = logits[np.arange(len(targets)), targets].astype(np.float64)
    return log_normalizers(logits) - target_logits
