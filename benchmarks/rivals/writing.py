"""Engines that decode greedily by themselves and return no logits while they write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mistill.engine.language_model import Choose, greedy

# Tokens written after a prompt for which ``reserve`` was not called.
_UNBOUNDED = 256


class GreedyEngine(ABC):
    """Base of such engines: limits how much they write, and samples from logits otherwise.

    Attributes:
        vocabulary_size: Number of logits per position, V.
        context_length: Context in tokens.
    """

    vocabulary_size: int
    context_length: int
    _room: int = 0

    def reserve(self, positions: int) -> None:
        """Limit prompt and continuation of the following texts to this many tokens.

        Args:
            positions: At most ``context_length``.
        """
        self._room = positions

    @abstractmethod
    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scores of every next token at every position; see ``LanguageModel.logits``."""

    def stream(self, ids: Sequence[int], choose: Choose = greedy) -> Iterator[int]:
        """Write tokens after a prompt, one at a time; see ``LanguageModel.stream``."""
        prompt = list(ids)
        room = self._room if self._room > len(prompt) else len(prompt) + _UNBOUNDED
        count = max(0, min(room, self.context_length) - len(prompt))
        if choose is greedy:
            return self._greedily(prompt, count)
        return self._chosen(prompt, count, choose)

    @abstractmethod
    def _greedily(self, prompt: list[int], count: int) -> Iterator[int]:
        """Let the engine write so many tokens."""

    def _chosen(self, prompt: list[int], count: int, choose: Choose) -> Iterator[int]:
        text = list(prompt)
        for _ in range(count):
            text.append(int(choose(self.logits(np.array([text]))[0, -1])))
            yield text[-1]
