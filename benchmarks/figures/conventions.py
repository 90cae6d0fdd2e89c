"""Perplexity as papers and tools define it, so that it can be compared with published figures.

Both conventions read a text as one sequence of tokens, cut it into windows of one length without
overlap, drop the rest at the end, and give every window to the model by itself:

- ``gptq``, of the papers on GPTQ and after it (https://arxiv.org/abs/2210.17323 and its code):
  2,048 tokens, of which all but the first are predicted. Rows of a data set are joined by an empty
  line; a token for the beginning comes once, where the tokenizer writes one.
- ``llama.cpp``, of its program ``llama-perplexity``: 512 tokens, of which the last 255 are
  predicted, so that each has at least 256 before it; where the tokenizer writes a token for the
  beginning, it takes the place of the first token of every window.

Both read the whole text. The same text and vocabulary are needed to compare; bits per byte can be
compared between vocabularies too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.figures.passages import Passage
from mistill.measures.uncertainty import ratio_standard_error


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A definition of perplexity.

    Attributes:
        context_length: Tokens of a window.
        first_predicted: Place in the window of the first token that is predicted.
        begins_windows: Whether every window begins with the token for the beginning, where the
            tokenizer writes one.
    """

    context_length: int
    first_predicted: int
    begins_windows: bool


CONVENTIONS = {
    "gptq": Convention(context_length=2048, first_predicted=1, begins_windows=False),
    "llama.cpp": Convention(context_length=512, first_predicted=257, begins_windows=True),
}


@dataclass(frozen=True, kw_only=True)
class QuotedPerplexity:
    """The perplexity of one model in one convention.

    Attributes:
        convention: Its name.
        context_length: Tokens of a window.
        text_fingerprint: SHA-256 of the tokens and of which of them count.
        window_losses: Negative log-probability of all predicted tokens of each window, in nats.
        window_tokens: How many those are.
        window_bytes: How many bytes of text they spell.
    """

    convention: str
    context_length: int
    text_fingerprint: str
    window_losses: tuple[float, ...]
    window_tokens: tuple[int, ...]
    window_bytes: tuple[int, ...]

    @property
    def value(self) -> float:
        """The perplexity: e to the mean loss over all predicted tokens."""
        return math.exp(sum(self.window_losses) / sum(self.window_tokens))

    @property
    def standard_error(self) -> float | None:
        """Standard error of the perplexity: delta method, between windows; None for a single one.

        llama.cpp takes all tokens to be independent, so the error that it prints is smaller.
        """
        error = ratio_standard_error(self.window_losses, self.window_tokens)
        return None if error is None else self.value * error

    @property
    def bits_per_byte(self) -> float:
        """Bits to predict a byte of the text."""
        return sum(self.window_losses) / math.log(2) / sum(self.window_bytes)


def cut_windows(
    ids: NDArray[np.int64], convention: Convention, bos_id: int | None
) -> list[Passage]:
    """Cut a sequence of tokens into the windows of a convention.

    Args:
        ids: Shape (T,), the text; it begins with the token for the beginning if there is one.
        convention: Which windows.
        bos_id: The token for the beginning; None where the tokenizer writes none.

    Returns:
        Windows; none if the text is shorter than one.
    """
    length = convention.context_length
    windows = ids[: len(ids) // length * length].reshape(-1, length).copy()
    if convention.begins_windows and bos_id is not None:
        windows[:, 0] = bos_id
    predicted = np.arange(1, length) >= convention.first_predicted
    return [Passage(window, predicted.copy()) for window in windows]


def spelled_bytes(passages: Sequence[Passage], bytes_of: Callable[[int], int]) -> tuple[int, ...]:
    """Bytes of text that the predicted tokens of each passage spell.

    Args:
        passages: The text.
        bytes_of: Bytes of a token; 0 for a special token, which spells nothing.

    Returns:
        Bytes of each passage.
    """
    token_bytes: dict[int, int] = {}
    totals = []
    for passage in passages:
        total = 0
        for token in passage.targets.tolist():
            if token not in token_bytes:
                token_bytes[token] = bytes_of(token)
            total += token_bytes[token]
        totals.append(total)
    return tuple(totals)
