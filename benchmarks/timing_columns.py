"""Figures of speed that not every comparison has: at chosen lengths, of loading, of memory.

A column is made for every length that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from benchmarks.columns import MEGABYTE, Column, significant
from benchmarks.comparison import ModelResult
from benchmarks.latency import Latency, LatencyAt
from mistill.uncertainty import quartiles


def timing_columns(models: Iterable[ModelResult]) -> tuple[Column, ...]:
    """The columns of the lengths that some models were timed at, and those of loading and memory.

    Args:
        models: The results.

    Returns:
        Columns, in the order of reading.
    """
    listed = list(models)
    prompts = sorted({at.tokens for model in listed for at in model.prompts})
    depths = sorted({at.tokens for model in listed for at in model.depths})
    columns = [column for tokens in prompts for column in _reading(tokens)]
    columns += [column for tokens in depths for column in _writing(tokens)]
    columns += [column for cold in (True, False) for column in _loading(cold)]
    return (*columns, *_ROOFLINE)


def roofline_share(model: ModelResult) -> float | None:
    """How much of what memory allows a model has reached while writing.

    Args:
        model: The result.

    Returns:
        Tokens per second by those at which the weights and the cache of every step would be read
        at the speed of memory; None where the bytes of a step are not known.
    """
    if model.step_bytes is None:
        return None
    depth = median(t.prompt_tokens + len(t.token_seconds) / 2 for t in model.latency.turns)
    return model.latency.decode_tokens_per_second / model.step_bytes.ceiling(depth)


def _at(entries: Sequence[LatencyAt], tokens: int) -> Latency | None:
    return next((entry.latency for entry in entries if entry.tokens == tokens), None)


def _reading(tokens: int) -> list[Column]:
    def found(model: ModelResult) -> Latency | None:
        return _at(model.prompts, tokens)

    return [
        Column(
            key=f"first_token_ms_at_{tokens}",
            title=f"First token of {tokens:,}",
            unit="ms",
            meaning=f"From a prompt of {tokens:,} tokens being handed over to the first token: "
            "median of the rounds, and quartiles.",
            figure=_of(found, lambda timed: timed.first_token_seconds * 1000),
            write=_plain,
            better="lower",
            spread=_pair(found, lambda timed: timed.first_token_quartiles, 1000),
            compact=False,
            nature="clock",
            samples=_all(found, lambda timed: [t.first_token_seconds for t in timed.turns]),
        ),
        Column(
            key=f"prompt_tokens_per_second_at_{tokens}",
            title=f"Reading {tokens:,}",
            unit="tok/s",
            meaning=f"Tokens of a prompt of {tokens:,} by the time to the first token: median of "
            "the rounds, and quartiles.",
            figure=_of(found, lambda timed: timed.prompt_tokens_per_second),
            write=_plain,
            better="higher",
            spread=_pair(found, lambda timed: timed.prompt_quartiles),
            nature="clock",
            samples=_all(
                found, lambda timed: [t.prompt_tokens / t.first_token_seconds for t in timed.turns]
            ),
        ),
    ]


def _writing(tokens: int) -> list[Column]:
    def found(model: ModelResult) -> Latency | None:
        return _at(model.depths, tokens)

    return [
        Column(
            key=f"decode_tokens_per_second_at_{tokens}",
            title=f"Writing at {tokens:,}",
            unit="tok/s",
            meaning=f"Tokens written per second after {tokens:,} tokens: median of the rounds, and "
            "quartiles.",
            figure=_of(found, lambda timed: timed.decode_tokens_per_second),
            write=_plain,
            better="higher",
            spread=_pair(found, lambda timed: timed.decode_quartiles),
            nature="clock",
            samples=_all(found, lambda timed: [t.decode_tokens_per_second for t in timed.turns]),
        ),
        Column(
            key=f"slow_token_ms_at_{tokens}",
            title=f"Slow token at {tokens:,}",
            unit="ms",
            meaning=f"The time that one token in twenty exceeds after {tokens:,} tokens: the 95th "
            "percentile over all rounds.",
            figure=_of(found, lambda timed: timed.slow_token_seconds * 1000),
            write=_plain,
            better="lower",
            compact=False,
            nature="clock",
        ),
    ]


def _loading(cold: bool) -> list[Column]:
    word = "cold" if cold else "warm"
    files = "dropped from the page cache" if cold else "in the page cache"

    def times(model: ModelResult) -> list[float]:
        return [load.seconds * 1000 for load in model.loads if load.cold is cold]

    def answers(model: ModelResult) -> list[float]:
        return [
            (load.seconds + load.first_token_seconds) * 1000
            for load in model.loads
            if load.cold is cold
        ]

    return [
        Column(
            key=f"load_{word}_ms",
            title=f"Load, {word}",
            unit="ms",
            meaning=f"Time to open the folder with its files {files}, in a process of its own "
            "whose libraries are loaded: median, and quartiles.",
            figure=lambda model: median(times(model)) if times(model) else None,
            write=_plain,
            better="lower",
            spread=lambda model: _outer(times(model)),
            nature="clock",
            samples=lambda model: times(model) or None,
        ),
        Column(
            key=f"first_answer_{word}_ms",
            title=f"Load and first token, {word}",
            unit="ms",
            meaning=f"The same until the first token after the usual prompt, with files {files}: "
            "an engine that maps its file reads much of it only then.",
            figure=lambda model: median(answers(model)) if answers(model) else None,
            write=_plain,
            better="lower",
            spread=lambda model: _outer(answers(model)),
            compact=False,
            nature="clock",
            samples=lambda model: answers(model) or None,
        ),
    ]


_ROOFLINE = (
    Column(
        key="mb_per_token",
        title="Read per token",
        unit="MB",
        meaning="Weights that a step of one token reads, as the engine lays them out, in millions "
        "of bytes; by the folder's manifest.",
        figure=lambda model: (
            None if model.step_bytes is None else model.step_bytes.packed_bytes / MEGABYTE
        ),
        write=lambda value: significant(value),
        better="lower",
        compact=False,
        nature="bytes",
    ),
    Column(
        key="roofline_share",
        title="Of the roofline",
        unit="%",
        meaning="Writing by the speed at which memory could give the weights and the cache of "
        "every step, as measured in this run.",
        figure=roofline_share,
        write=lambda value: f"{value * 100:.0f}",
        better="higher",
        compact=False,
        nature="clock",
    ),
)


def _of(
    find: Callable[[ModelResult], Latency | None], take: Callable[[Latency], float]
) -> Callable[[ModelResult], float | None]:
    def figure(model: ModelResult) -> float | None:
        timed = find(model)
        return None if timed is None else take(timed)

    return figure


def _pair(
    find: Callable[[ModelResult], Latency | None],
    take: Callable[[Latency], tuple[float, float, float]],
    scale: float = 1,
) -> Callable[[ModelResult], tuple[float, float] | None]:
    def spread(model: ModelResult) -> tuple[float, float] | None:
        timed = find(model)
        return None if timed is None else (take(timed)[0] * scale, take(timed)[2] * scale)

    return spread


def _all(
    find: Callable[[ModelResult], Latency | None], take: Callable[[Latency], list[float]]
) -> Callable[[ModelResult], list[float] | None]:
    def samples(model: ModelResult) -> list[float] | None:
        timed = find(model)
        return None if timed is None else take(timed)

    return samples


def _outer(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    low, _, high = quartiles(values)
    return low, high


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else significant(value)
