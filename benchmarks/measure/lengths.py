"""Speed at requested lengths: of the prompt that is read, and of the text before what is written.

All models take turns at every length, as they do with prompts of the usual length. A length that
does not fit into a model's context is left out, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.figures.latency import Latency, LatencyAt, Turn
from benchmarks.figures.passages import Passage, cut_prompts
from benchmarks.settings import BenchSettings

# The first token ends the reading; one more makes a turn that has a time between tokens.
_READ_ONLY = 2


TakeTurn = Callable[[list[int], int, float], Turn]
"""Lets one model read a prompt, write so many tokens, and stop after so many seconds."""


@dataclass
class TimedModel:
    """One model and its turns at the requested lengths.

    Attributes:
        name: Its name.
        context_length: Its context in tokens.
        take_turn: Lets it take a turn.
        prompt_tokens_per_second: Its reading speed at the usual length.
        turns: Its turns by length.
    """

    name: str
    context_length: int
    take_turn: TakeTurn
    prompt_tokens_per_second: float
    turns: dict[int, list[Turn]] = field(default_factory=dict)


def new_tokens_at(settings: BenchSettings) -> dict[int, int]:
    """Tokens to write after a prompt of each requested length.

    Args:
        settings: The lengths.

    Returns:
        Length of the prompt to tokens that are written, shortest first; two where only reading is
        timed.
    """
    lengths = dict.fromkeys(settings.prompts, _READ_ONLY)
    lengths |= dict.fromkeys(settings.depths, settings.new_tokens)
    return dict(sorted(lengths.items()))


def lengths_left_out(settings: BenchSettings, context_length: int) -> tuple[str, ...]:
    """The requested lengths that do not fit into a context.

    Args:
        settings: The lengths.
        context_length: Context of the model in tokens.

    Returns:
        A reason for each such length.
    """
    return tuple(
        f"{tokens:,} tokens and {more} more: the context holds {context_length:,}"
        for tokens, more in new_tokens_at(settings).items()
        if not _fits(tokens, more, context_length)
    )


def take_turns(
    models: Sequence[TimedModel], passages: Sequence[Passage], settings: BenchSettings
) -> None:
    """Let every model take its turns at every length, after a first, long one to warm up.

    Args:
        models: The models; their turns are added to them.
        passages: Where the prompts come from.
        settings: Lengths and rounds.
    """
    lengths = new_tokens_at(settings)
    if not lengths:
        return
    longest = max(lengths)
    first, *prompts = cut_prompts(
        passages, length=max(longest, 1), count=1 + settings.rounds * len(lengths)
    )
    for model in models:
        fitting = [tokens for tokens, more in lengths.items() if _fits(tokens, more, model)]
        if fitting:
            model.take_turn(first[: max(fitting[-1], 1)], lengths[fitting[-1]], 0.0)
    for number in range(settings.rounds):
        for index, (tokens, more) in enumerate(lengths.items()):
            prompt = prompts[number * len(lengths) + index][: max(tokens, 1)]
            for model in [*models[number % len(models) :], *models[: number % len(models)]]:
                if _fits(tokens, more, model):
                    # The limit is for writing: the time to read the prompt is added to it.
                    seconds = settings.turn_seconds + tokens / model.prompt_tokens_per_second
                    turn = model.take_turn(prompt, more, seconds)
                    model.turns.setdefault(tokens, []).append(turn)


def latencies(turns: Mapping[int, Sequence[Turn]], lengths: Sequence[int]) -> tuple[LatencyAt, ...]:
    """The turns at some lengths.

    Args:
        turns: Turns by length.
        lengths: Which of them.

    Returns:
        One for each length that was measured, shortest first.
    """
    return tuple(
        LatencyAt(tokens=tokens, latency=Latency(turns=tuple(turns[tokens])))
        for tokens in sorted(lengths)
        if tokens in turns
    )


def _fits(tokens: int, more: int, model: TimedModel | int) -> bool:
    context = model if isinstance(model, int) else model.context_length
    return max(tokens, 1) + more <= context
