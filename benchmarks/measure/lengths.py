"""Speed at chosen lengths: of the prompt that is read, and of the text that is written after.

All models take turns at every length, as they do with the prompts of the usual length. A length
that a model's context does not hold is left out and said so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.figures.latency import Latency, LatencyAt, Turn
from benchmarks.figures.passages import Passage, cut_prompts
from benchmarks.settings import BenchSettings

# The first token ends the reading; one more makes a turn that has a time between tokens.
_READ_ONLY = 2


Writes = Callable[[list[int], int, float], Turn]
"""Lets one model read a prompt, write so many tokens, and stop after so many seconds."""


@dataclass
class Timed:
    """One model and its turns at the lengths that were asked for.

    Attributes:
        name: What it is called.
        context_length: Most positions that it holds.
        writes: Lets it take a turn.
        prompt_tokens_per_second: How fast it is known to read.
        turns: Its turns by length.
    """

    name: str
    context_length: int
    writes: Writes
    prompt_tokens_per_second: float
    turns: dict[int, list[Turn]] = field(default_factory=dict)


def new_tokens_at(settings: BenchSettings) -> dict[int, int]:
    """The lengths that were asked for.

    Args:
        settings: What was asked for.

    Returns:
        Tokens that are written after a prompt of each length, shortest first; two after those
        that are only read.
    """
    wanted = dict.fromkeys(settings.prompts, _READ_ONLY)
    wanted |= dict.fromkeys(settings.depths, settings.new_tokens)
    return dict(sorted(wanted.items()))


def left_out(settings: BenchSettings, context_length: int) -> tuple[str, ...]:
    """What a context does not hold.

    Args:
        settings: What was asked for.
        context_length: Most positions of the model.

    Returns:
        A sentence for each such length.
    """
    return tuple(
        f"{tokens:,} tokens and {more} more: the context holds {context_length:,}"
        for tokens, more in new_tokens_at(settings).items()
        if not _fits(tokens, more, context_length)
    )


def take_turns(
    models: Sequence[Timed], passages: Sequence[Passage], settings: BenchSettings
) -> None:
    """Let every model take its turns at every length; a first, long one makes room and is not kept.

    Args:
        models: The models; their turns are added to them.
        passages: Where the prompts come from.
        settings: Lengths and rounds.
    """
    wanted = new_tokens_at(settings)
    if not wanted:
        return
    longest = max(wanted)
    first, *prompts = cut_prompts(
        passages, length=max(longest, 1), count=1 + settings.rounds * len(wanted)
    )
    for model in models:
        held = [tokens for tokens, more in wanted.items() if _fits(tokens, more, model)]
        if held:
            model.writes(first[: max(held[-1], 1)], wanted[held[-1]], 0.0)
    for number in range(settings.rounds):
        for place, (tokens, more) in enumerate(wanted.items()):
            prompt = prompts[number * len(wanted) + place][: max(tokens, 1)]
            for model in [*models[number % len(models) :], *models[: number % len(models)]]:
                if _fits(tokens, more, model):
                    # A slow model stops after so long of writing; what it reads is not counted.
                    seconds = settings.turn_seconds + tokens / model.prompt_tokens_per_second
                    turn = model.writes(prompt, more, seconds)
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


def _fits(tokens: int, more: int, model: Timed | int) -> bool:
    context = model if isinstance(model, int) else model.context_length
    return max(tokens, 1) + more <= context
