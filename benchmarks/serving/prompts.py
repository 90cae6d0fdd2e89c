"""Prompts of a wanted length, no two of which begin alike, for any vocabulary.

A server that keeps what it read would otherwise read only the first.
"""

from __future__ import annotations

import random

from benchmarks.serving.streams import Server

_WORDS = (
    "wind rain bread ships bees stone music trees glass salt rivers maps clocks letters roads "
    "apples bridges lamps winter summer paper engines gardens islands copper wool silver"
)
_QUESTION = "Write a long story in which all of these occur, with many details:"


class Prompts:
    """Makes conversations of one message, about as long as wanted.

    Attributes:
        tokens: Tokens that a prompt should have.
    """

    tokens: int

    def __init__(self, server: Server, tokens: int, seed: int = 0) -> None:
        """Ask a server how many words make so many tokens.

        Args:
            server: Whose tokens count.
            tokens: Tokens that a prompt should have, the chat template's own included.
            seed: Seed of the words.
        """
        self.tokens = tokens
        self._random = random.Random(seed)
        self._words = 1
        counts = {}
        for words in (1, 41):
            self._words = words
            counts[words] = server.reply(self.next(), max_tokens=1).prompt_tokens
        each = max((counts[41] - counts[1]) / 40, 0.1)
        self._words = max(1, round(1 + (tokens - counts[1]) / each)) if counts[1] else tokens

    def next(self) -> list[dict[str, str]]:
        """A conversation that was not asked for before.

        Returns:
            Its messages.
        """
        number = self._random.randrange(10**6, 10**7)
        choices = _WORDS.split()
        words = " ".join(self._random.choice(choices) for _ in range(self._words))
        return [{"role": "user", "content": f"{number}. {_QUESTION} {words}"}]
