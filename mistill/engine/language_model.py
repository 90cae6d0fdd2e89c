"""What benchmarks and chat need of a model, whichever library runs it.

Token ids and logits are numpy arrays, so that a laptop without PyTorch can meet the protocol.
B is batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError

Provider = Literal["cpu", "cuda", "tensorrt", "coreml", "directml"]
Choose = Callable[[NDArray[np.float32]], int]

LOOK_UP = "lookup"
"""The draft that is not a model: prompt lookup decoding."""


def greedy(logits: NDArray[np.float32]) -> int:
    """The most probable token.

    Args:
        logits: Shape (V,).

    Returns:
        Its id; the lowest of those that tie.

    Raises:
        FolderError: If the logits are not numbers.
    """
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        raise not_numbers()
    return token


def not_numbers() -> FolderError:
    """The error for a model whose logits are not numbers.

    Returns:
        The error to raise.
    """
    return FolderError(
        "the model computes logits that are infinite or not numbers, so that no token can be "
        "chosen; its weights are damaged, or too large for its type"
    )


class LanguageModel(Protocol):
    """A model that scores token ids and writes more of them."""

    @property
    def vocabulary_size(self) -> int:
        """Number of logits per position, V."""

    @property
    def context_length(self) -> int:
        """Most positions that the model can hold at once."""

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position.

        Args:
            ids: Shape (B, T), without padding.

        Returns:
            Shape (B, T, V); position t scores the token at t + 1.
        """

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after the ids given, one at a time, until the context is full.

        The caller stops when it has seen enough; the end-of-turn token is yielded like any other.

        Args:
            ids: The prompt, at least one token.
            choose: Picks a token from the logits (V,) of the last position.

        Returns:
            Token ids, one at a time.

        Raises:
            ValueError: If the prompt is empty or holds an id that is not in the vocabulary.
            ContextError: If it does not fit into the context.
        """
