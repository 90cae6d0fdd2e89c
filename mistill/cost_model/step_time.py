"""How large a chatbot may be that is to write so many tokens a second on this processor.

To write a token a model reads every weight once, so that the time of a step grows with the bytes
that it reads (``mistill.cost_model``), on top of what its operators cost whatever they multiply.
How fast memory and kernels are here, and how much the operators cost, is measured and not looked
up: two chatbots of the same model, rounded in a moment to the fewest and to the most bits that are
chosen from, write in turn. Between them the seconds of a step are a straight line in bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Protocol

from mistill.errors import SettingsError

_PROMPT_TOKENS = 16
_NEW_TOKENS = 24
_ROUNDS = 5
# The threads of another model spin for a moment after its step.
_SETTLE_SECONDS = 0.1
# Times vary from run to run by about as much, and what is asked for is to be reached.
_MARGIN = 1.05


@dataclass(frozen=True)
class TimedSize:
    """A chatbot's size and speed.

    Attributes:
        size_bytes: Bytes of its weights, scales and tables.
        step_seconds: Median time to write one token.
    """

    size_bytes: float
    step_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens that it writes in a second."""
        return 1 / self.step_seconds


class Writer(Protocol):
    """A running model; meets ``mistill.engine.language_model.LanguageModel``."""

    @property
    def vocabulary_size(self) -> int:
        """Number of logits, V."""
        ...

    @property
    def context_length(self) -> int:
        """Most positions that it can hold at once."""
        ...

    def stream(self, ids: Sequence[int]) -> Iterator[int]:
        """Write tokens after a prompt, greedily.

        Args:
            ids: The prompt.

        Returns:
            Token ids, one at a time.
        """
        ...


def time_steps(models: Sequence[Writer]) -> list[float]:
    """Let running models write in turn.

    Args:
        models: The models.

    Returns:
        Seconds of a step of each: the median of all its tokens but the first of a turn.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for number in range(1 + _ROUNDS):
        for model, samples in zip(models, seconds, strict=True):
            time.sleep(_SETTLE_SECONDS)
            # A first token, and one to be timed, whatever the context holds.
            prompt = max(1, min(_PROMPT_TOKENS, model.context_length - 2))
            room = model.context_length - prompt
            steps = model.stream([number % model.vocabulary_size] * prompt)
            last = None
            for _ in islice(steps, min(_NEW_TOKENS, room)):
                now = time.perf_counter()
                # The first round warms up.
                if last is not None and number:
                    samples.append(now - last)
                last = now
    return [median(samples) for samples in seconds]


def size_for_speed(
    tokens_per_second: float, small: TimedSize, large: TimedSize
) -> tuple[float, float]:
    """The largest size that writes as fast as asked for, with a twentieth to spare.

    Args:
        tokens_per_second: What is asked for.
        small: The smallest chatbot that can be made.
        large: The largest one that is worth making.

    Returns:
        The size in bytes, and the tokens a second that are predicted for it.

    Raises:
        SettingsError: If not even the smallest one is as fast.
    """
    if small.tokens_per_second < tokens_per_second:
        raise SettingsError(
            f"tokens_per_second is {tokens_per_second:g}, and the smallest chatbot of this model, "
            f"{small.size_bytes / 1e6:.1f} MB in 4 bits, writes {small.tokens_per_second:.0f} a "
            "second here; ask for fewer, or compress a student of it that has fewer layers "
            "(mistill student)"
        )
    most_seconds = 1 / (tokens_per_second * _MARGIN)
    if large.step_seconds <= most_seconds:
        return large.size_bytes, large.tokens_per_second
    if most_seconds <= small.step_seconds:
        return small.size_bytes, small.tokens_per_second
    share = (most_seconds - small.step_seconds) / (large.step_seconds - small.step_seconds)
    return small.size_bytes + share * (large.size_bytes - small.size_bytes), 1 / most_seconds
