"""How long a model takes until the first token of an answer, and for the rest.

Reading the prompt is one large computation and is bound by arithmetic; writing computes one token
at a time and is bound by how fast the weights can be read. The two are timed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.figures.energy import EnergyMeter
from mistill.engine.language_model import LanguageModel
from mistill.measures.uncertainty import quartiles

Clock = Callable[[], float]

FEWEST_TOKENS = 8

SETTLE_SECONDS = 0.1
"""Wait before a turn: threads of the engine that ran before keep spinning for some 35 ms and would
share the processors with the next engine."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One prompt read and one answer written.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        first_token_seconds: From the prompt being handed over to the first token.
        token_seconds: From each token to the next.
        decode_joules: Energy that the machine spent on the tokens after the first; None where it
            has no energy counters.
    """

    prompt_tokens: int
    first_token_seconds: float
    token_seconds: tuple[float, ...]
    decode_joules: float | None = None

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, by the time that they took."""
        return len(self.token_seconds) / sum(self.token_seconds)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The turns of one model.

    Attributes:
        turns: One for each round, after a warm-up that is not kept.
    """

    turns: tuple[Turn, ...]

    @property
    def first_token_seconds(self) -> float:
        """Median time from the prompt to the first token."""
        return self.first_token_quartiles[1]

    @property
    def first_token_quartiles(self) -> tuple[float, float, float]:
        """Quartiles of the time to the first token, over the rounds."""
        return quartiles([turn.first_token_seconds for turn in self.turns])

    @property
    def prompt_tokens_per_second(self) -> float:
        """Median over the rounds of prompt tokens by the time to the first token."""
        return self.prompt_quartiles[1]

    @property
    def prompt_quartiles(self) -> tuple[float, float, float]:
        """Quartiles of the prompt tokens per second, over the rounds."""
        return quartiles([turn.prompt_tokens / turn.first_token_seconds for turn in self.turns])

    @property
    def decode_tokens_per_second(self) -> float:
        """Median over the rounds of tokens written per second, the first token not counted."""
        return self.decode_quartiles[1]

    @property
    def decode_quartiles(self) -> tuple[float, float, float]:
        """Quartiles of the tokens written per second, over the rounds."""
        return quartiles([turn.decode_tokens_per_second for turn in self.turns])

    @property
    def slow_token_seconds(self) -> float:
        """The time that one token in twenty exceeds, over all rounds."""
        return float(np.quantile([s for turn in self.turns for s in turn.token_seconds], 0.95))

    @property
    def joules_per_token(self) -> float | None:
        """Median over the rounds of energy by tokens written; None where it was not measured."""
        joules = [
            turn.decode_joules / len(turn.token_seconds)
            for turn in self.turns
            if turn.decode_joules is not None
        ]
        return quartiles(joules)[1] if joules else None


@dataclass(frozen=True, kw_only=True)
class LatencyAt:
    """The turns of one model with prompts of one length.

    Attributes:
        tokens: Tokens of the prompt: those that are read, or those after which writing begins.
        latency: The turns.
    """

    tokens: int
    latency: Latency


def time_turn(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    seconds: float,
    clock: Clock,
    meter: EnergyMeter | None = None,
) -> Turn:
    """Let a model read a prompt and write greedily, and look at the clock after every token.

    Args:
        model: The model.
        prompt: Token ids.
        new_tokens: Tokens to write, the first one included.
        seconds: A slow model stops after this long, but never before 8 tokens.
        clock: Monotonic time in seconds.
        meter: Measures the energy; None leaves it out.

    Returns:
        The times, and the energy.
    """
    stream = model.stream(prompt)
    before: tuple[int, ...] = ()
    ticks = [clock()]
    for _ in stream:
        ticks.append(clock())
        written = len(ticks) - 1
        if meter is not None and written == 1:
            before = meter.read()
        late = ticks[-1] - ticks[0] > seconds and written >= FEWEST_TOKENS
        if written == new_tokens or late:
            break
    turn = turn_from_ticks(len(prompt), ticks)
    if meter is None or not before:
        return turn
    return replace(turn, decode_joules=meter.joules(before, meter.read()))


def turn_from_ticks(prompt_tokens: int, ticks: Sequence[float]) -> Turn:
    """Turn moments into durations.

    Args:
        prompt_tokens: Tokens of the prompt.
        ticks: The start, then the moment of every token.

    Returns:
        The durations.
    """
    gaps = np.diff(ticks)
    return Turn(
        prompt_tokens=prompt_tokens,
        first_token_seconds=float(gaps[0]),
        token_seconds=tuple(float(gap) for gap in gaps[1:]),
    )
