"""How a chat model replies to everyday prompts: whether its replies go round in circles.

Replies are greedy, by the engine that its user would run. A model that was compressed too far is
still fluent for a sentence and then says it again; KL on held-out text does not show that, because
there every token is predicted from text that somebody else wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

from mistill.measures.repetition import distinct_share, most_repeats
from mistill.measures.uncertainty import mean_of, standard_error_of_mean

#: A reply loops if a run of four words stands in it more often than this.
MOST_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Replies:
    """The replies of one model.

    Attributes:
        fingerprint: SHA-256 of the prompts and of the most tokens of a reply.
        texts: The reply to each prompt.
        ended: Whether the model ended it, and not the limit of its length.
    """

    fingerprint: str
    texts: tuple[str, ...]
    ended: tuple[bool, ...]

    def distinct(self, length: int) -> float:
        """Different runs of words within a reply as a share of all of them: distinct-n.

        Args:
            length: Words of a run, n.

        Returns:
            The mean over the replies, above 0 to 1.
        """
        return mean_of(self.distinct_shares(length))

    def distinct_error(self, length: int) -> float | None:
        """Standard error of ``distinct``, between replies.

        Args:
            length: Words of a run, n.

        Returns:
            The error; None for a single reply.
        """
        return standard_error_of_mean(self.distinct_shares(length))

    def distinct_shares(self, length: int) -> list[list[float]]:
        """Distinct-n of each reply.

        Args:
            length: Words of a run, n.

        Returns:
            One number for each reply.
        """
        return [[distinct_share(text, length)] for text in self.texts]

    @property
    def repeats(self) -> tuple[int, ...]:
        """How often the run of four words stands in each reply that stands there most often."""
        return tuple(most_repeats(text) for text in self.texts)

    @property
    def most_repeats(self) -> int:
        """The largest of ``repeats``."""
        return max(self.repeats)

    @property
    def loops(self) -> tuple[bool, ...]:
        """Whether a run of four words stands in each reply more than three times."""
        return tuple(repeats > MOST_REPEATS for repeats in self.repeats)
