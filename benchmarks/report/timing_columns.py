"""Figures of speed, at the usual and at further requested lengths, and of loading.

There is a column for every requested length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.figures.column import MEGABYTE, Column, of_part, rate, significant, whole
from benchmarks.figures.footprint import Load
from benchmarks.figures.latency import Latency, Turn
from benchmarks.figures.model_result import ModelResult
from mistill.measures.uncertainty import quartiles

Find = Callable[[ModelResult], Latency | None]


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
    columns = [column for tokens in prompts for column in _columns_of_reading(tokens)]
    columns += [column for tokens in depths for column in _columns_of_writing(tokens)]
    columns += [column for cold in (True, False) for column in _columns_of_loading(cold)]
    return (*columns, *_ROOFLINE)


def roofline_share(model: ModelResult) -> float | None:
    """Writing speed as a share of the limit set by memory bandwidth and integer kernels.

    Args:
        model: The result.

    Returns:
        Tokens per second divided by the smaller of two limits: the speed at which memory could
        deliver the weights and the KV cache of every step, and the speed of the integer kernels;
        None where the bytes of a step are not known.
    """
    if model.step_bytes is None:
        return None
    depth = median(t.prompt_tokens + len(t.token_seconds) / 2 for t in model.latency.turns)
    return model.latency.decode_tokens_per_second / model.step_bytes.ceiling(depth)


def _first_token(find: Find, **more: Any) -> Column:
    return Column(
        unit="ms",
        figure=of_part(find, lambda timed: timed.first_token_seconds * 1000),
        better="lower",
        nature="clock",
        samples=of_part(find, lambda timed: [turn.first_token_seconds for turn in timed.turns]),
        **more,
    )


def _reading(find: Find, **more: Any) -> Column:
    return _speed(
        find,
        lambda timed: timed.prompt_quartiles,
        lambda turn: turn.prompt_tokens / turn.first_token_seconds,
        **more,
    )


def _writing(find: Find, **more: Any) -> Column:
    return _speed(
        find,
        lambda timed: timed.decode_quartiles,
        lambda turn: turn.decode_tokens_per_second,
        **more,
    )


def _speed(
    find: Find,
    of: Callable[[Latency], tuple[float, float, float]],
    each: Callable[[Turn], float],
    **more: Any,
) -> Column:
    """A column of tokens per second."""
    return Column(
        unit="tok/s",
        figure=of_part(find, lambda timed: of(timed)[1]),
        write=rate,
        better="higher",
        spread=of_part(find, lambda timed: _outer(of(timed))),
        nature="clock",
        samples=of_part(find, lambda timed: [each(turn) for turn in timed.turns]),
        **more,
    )


def _outer(values: tuple[float, float, float]) -> tuple[float, float]:
    return values[0], values[2]


# --- at the usual length ------------------------------------------------------------------------


def _usual(model: ModelResult) -> Latency:
    return model.latency


def _joules(model: ModelResult) -> list[float] | None:
    spent = [
        turn.decode_joules / len(turn.token_seconds)
        for turn in model.latency.turns
        if turn.decode_joules is not None
    ]
    return spent or None


SPEED_COLUMNS = (
    _first_token(
        _usual,
        key="first_token_ms",
        title="First token",
        meaning="Time from the start of reading the prompt to the first token: median of the "
        "rounds.",
        write=whole,
    ),
    _reading(
        _usual,
        key="prompt_tokens_per_second",
        title="Reading",
        meaning="Prompt tokens divided by the time to the first token: median of the rounds, and "
        "quartiles.",
    ),
    _writing(
        _usual,
        key="decode_tokens_per_second",
        title="Writing",
        meaning="Tokens written per second after the first: median of the rounds, and quartiles.",
    ),
    _writing(
        lambda model: model.transformers_latency,
        key="transformers_decode_tokens_per_second",
        title="transformers",
        meaning="Writing speed of transformers' own greedy generate, for float folders only.",
        compact=False,
    ),
    Column(
        key="joules_per_token",
        title="Energy",
        unit="J/token",
        meaning="Energy of the whole machine for each token after the first: median of the rounds. "
        "Only on machines with energy counters.",
        figure=lambda model: model.latency.joules_per_token,
        write=significant,
        better="lower",
        nature="clock",
        samples=_joules,
    ),
)


# --- at chosen lengths --------------------------------------------------------------------------


def _columns_of_reading(tokens: int) -> list[Column]:
    def find(model: ModelResult) -> Latency | None:
        return next((at.latency for at in model.prompts if at.tokens == tokens), None)

    def spread(timed: Latency) -> tuple[float, float]:
        low, high = _outer(timed.first_token_quartiles)
        return low * 1000, high * 1000

    return [
        _first_token(
            find,
            key=f"first_token_ms_at_{tokens}",
            title=f"First token of {tokens:,}",
            meaning=f"Time from the start of reading a prompt of {tokens:,} tokens to the first "
            "token: median of the rounds, and quartiles.",
            write=rate,
            spread=of_part(find, spread),
            compact=False,
        ),
        _reading(
            find,
            key=f"prompt_tokens_per_second_at_{tokens}",
            title=f"Reading {tokens:,}",
            meaning=f"Tokens of a prompt of {tokens:,} divided by the time to the first token: "
            "median of the rounds, and quartiles.",
        ),
    ]


def _columns_of_writing(tokens: int) -> list[Column]:
    def find(model: ModelResult) -> Latency | None:
        return next((at.latency for at in model.depths if at.tokens == tokens), None)

    return [
        _writing(
            find,
            key=f"decode_tokens_per_second_at_{tokens}",
            title=f"Writing at {tokens:,}",
            meaning=f"Tokens written per second after a context of {tokens:,} tokens: median of "
            "the rounds, and quartiles.",
        ),
        Column(
            key=f"slow_token_ms_at_{tokens}",
            title=f"Slow token at {tokens:,}",
            unit="ms",
            meaning=f"The time that one token in twenty exceeds after a context of {tokens:,} "
            "tokens: the 95th percentile over all rounds.",
            figure=of_part(find, lambda timed: timed.slow_token_seconds * 1000),
            write=rate,
            better="lower",
            compact=False,
            nature="clock",
        ),
    ]


# --- loading, and what memory allows ------------------------------------------------------------


def _columns_of_loading(cold: bool) -> list[Column]:
    word = "cold" if cold else "warm"
    files = "dropped from the page cache" if cold else "in the page cache"

    def column(milliseconds: Callable[[Load], float], **more: Any) -> Column:
        def samples(model: ModelResult) -> Sequence[float] | None:
            return [milliseconds(load) for load in model.loads if load.cold is cold] or None

        return Column(
            unit="ms",
            figure=of_part(samples, median),
            write=rate,
            better="lower",
            spread=of_part(samples, lambda times: _outer(quartiles(times))),
            nature="clock",
            samples=samples,
            **more,
        )

    return [
        column(
            lambda load: load.seconds * 1000,
            key=f"load_{word}_ms",
            title=f"Load, {word}",
            meaning=f"Time to open the folder with its files {files}, in a new process whose "
            "libraries are loaded: median, and quartiles.",
        ),
        column(
            lambda load: (load.seconds + load.first_token_seconds) * 1000,
            key=f"first_answer_{word}_ms",
            title=f"Load and first token, {word}",
            meaning=f"Time to open the folder and write the first token after the usual prompt, "
            f"with its files {files}: an engine that maps its file reads much of it only then.",
            compact=False,
        ),
    ]


_ROOFLINE = (
    Column(
        key="mb_per_token",
        title="Read per token",
        unit="MB",
        meaning="Weights that a step of one token reads, as the engine lays them out, in millions "
        "of bytes, according to the folder's manifest.",
        figure=of_part(lambda model: model.step_bytes, lambda step: step.packed_bytes / MEGABYTE),
        write=significant,
        better="lower",
        compact=False,
        nature="bytes",
    ),
    Column(
        key="roofline_share",
        title="Of the roofline",
        unit="%",
        meaning="Writing speed as a share of its upper limit: that of memory bandwidth for the "
        "weights and the KV cache of every step, or that of the integer kernels with weights in "
        "the processor's cache, whichever is lower, as measured in this run.",
        figure=roofline_share,
        write=lambda value: f"{value * 100:.0f}",
        better="higher",
        compact=False,
        nature="clock",
    ),
)
