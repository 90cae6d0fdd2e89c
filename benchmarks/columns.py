"""The figures of a comparison, each with its unit, its meaning and its way of being written.

The terminal, the Markdown, the page and the summary in the JSON all take their columns from here,
so that a figure is called the same and means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from benchmarks.comparison import Comparison, ModelResult
from benchmarks.conventions import QuotedPerplexity
from benchmarks.fidelity import Fidelity
from benchmarks.latency import Latency

MEGABYTE = 1e6
EN_DASH = "\u2013"

#: What a figure depends on besides the model: nothing, a clock or the memory of one machine, the
#: text, or the text and the reference.
Nature = Literal["bytes", "clock", "memory", "text", "reference"]
Rounds = Sequence[float]
Passages = Sequence[Sequence[float]]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of every model.

    Attributes:
        key: Its name in the JSON summary, with the unit.
        title: Its name for people.
        unit: Its unit for people; may be empty.
        meaning: What it is, in a sentence.
        figure: Takes it from a result; None where the model has none.
        write: Turns the figure into text.
        better: Which end is the better one.
        spread: How far it may be off: plus and minus, or the quartiles; None where unknown.
        compact: Whether it is also shown where room is short.
        nature: What it depends on besides the model; decides when two reports can be compared.
        samples: What it was derived from: one number per round of a figure of a clock, or one per
            token, passage by passage, of a figure of text; None where nothing was kept.
        tail: Whether it is the 99th percentile of those samples, not their mean.
        logarithmic: Whether those samples are of its logarithm.
    """

    key: str
    title: str
    unit: str
    meaning: str
    figure: Callable[[ModelResult], float | None]
    write: Callable[[float], str]
    better: Literal["lower", "higher"]
    spread: Callable[[ModelResult], float | tuple[float, float] | None] = lambda _: None
    compact: bool = True
    nature: Nature
    samples: Callable[[ModelResult], Rounds | Passages | None] = lambda _: None
    tail: bool = False
    logarithmic: bool = False

    def text(self, model: ModelResult) -> str:
        """The figure of one model.

        Args:
            model: The result.

        Returns:
            Text; a dash where there is no figure.
        """
        value = self.figure(model)
        return EN_DASH if value is None else self.write(value)

    def spread_text(self, model: ModelResult) -> str:
        """How far the figure of one model may be off.

        Args:
            model: The result.

        Returns:
            ``± 0.12`` or ``41 to 44`` with a dash; empty where nothing is known.
        """
        spread = self.spread(model)
        if spread is None:
            return ""
        if isinstance(spread, tuple):
            return EN_DASH.join(map(self.write, spread))
        scale = 100 if self.unit == "%" else 1
        return f"± {significant(spread * scale, 2)}"


def columns_of(comparison: Comparison) -> tuple[Column, ...]:
    """The columns that say something about at least one model.

    The distance from a parent says nothing new where every parent is the reference.

    Args:
        comparison: The result.

    Returns:
        Columns, in the order of reading.
    """
    from benchmarks.timing_columns import timing_columns

    parents = {model.parent for model in comparison.models} - {None, comparison.reference}
    return tuple(
        column
        for column in (*COLUMNS, *timing_columns(comparison.models))
        if any(column.figure(model) is not None for model in comparison.models)
        and (column.key != "mean_parent_kl_nats" or parents)
    )


def summary(model: ModelResult) -> dict[str, Any]:
    """The derived figures of one model, for scripts that do not want to derive them.

    Args:
        model: The result.

    Returns:
        Figures by key; a spread is beside its figure, under ``KEY_spread``.
    """
    from benchmarks.timing_columns import timing_columns

    record: dict[str, Any] = {"slow_token_ms": model.latency.slow_token_seconds * 1000}
    for column in (*COLUMNS, *timing_columns([model])):
        record[column.key] = column.figure(model)
        spread = column.spread(model)
        if spread is not None:
            record[f"{column.key}_spread"] = spread
    return record


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it can be avoided.

    Args:
        value: The number.
        digits: Digits to keep.

    Returns:
        Text such as ``0.00312``, ``17.4`` or ``1,234``.
    """
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number
    if exponent < -5:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else significant(value)


def _percent(value: float) -> str:
    return f"{value * 100:.1f}"


def _outer(quartiles: tuple[float, float, float]) -> tuple[float, float]:
    return quartiles[0], quartiles[2]


def _fidelity(take: Callable[[Fidelity], T]) -> Callable[[ModelResult], T | None]:
    """The same of a result, None for the reference."""
    return lambda model: None if model.fidelity is None else take(model.fidelity)


def _parent(take: Callable[[Fidelity], T]) -> Callable[[ModelResult], T | None]:
    """The same of the distance from the parent, None where there is none."""
    return lambda model: None if model.parent_fidelity is None else take(model.parent_fidelity)


def _rival(take: Callable[[Latency], T]) -> Callable[[ModelResult], T | None]:
    """The same of a result, None where transformers' generate was not timed."""
    return lambda model: (
        None if model.transformers_latency is None else take(model.transformers_latency)
    )


def _quoted(name: str, take: Callable[[QuotedPerplexity], T]) -> Callable[[ModelResult], T | None]:
    """The same of a perplexity in a convention, None where it was not asked for."""

    def of(model: ModelResult) -> T | None:
        found = [one for one in model.quoted if one.convention == name]
        return take(found[0]) if found else None

    return of


def _quoted_column(name: str, how: str) -> Column:
    return Column(
        key=f"perplexity_{name.replace('.', '_')}",
        title=f"Perplexity, as {name}",
        unit="",
        meaning=f"The perplexity as {how}; ± is its standard error (delta method, between "
        "windows).",
        figure=_quoted(name, lambda found: found.value),
        write=lambda value: significant(value, 4),
        better="lower",
        spread=_quoted(name, lambda found: found.standard_error),
        compact=False,
        nature="text",
        samples=_quoted(
            name,
            lambda found: [
                [loss / tokens]
                for loss, tokens in zip(found.window_losses, found.window_tokens, strict=True)
            ],
        ),
        logarithmic=True,
    )


def _joules(model: ModelResult) -> list[float] | None:
    spent = [
        turn.decode_joules / len(turn.token_seconds)
        for turn in model.latency.turns
        if turn.decode_joules is not None
    ]
    return spent or None


def _rates(timed: Latency) -> list[float]:
    return [turn.decode_tokens_per_second for turn in timed.turns]


COLUMNS = (
    Column(
        key="size_mb",
        title="Size",
        unit="MB",
        meaning="Bytes on disk of the files that hold weights, in millions.",
        figure=lambda model: model.footprint.weight_bytes / MEGABYTE,
        write=_rate,
        better="lower",
        nature="bytes",
    ),
    Column(
        key="bits_per_weight",
        title="Bits per weight",
        unit="",
        meaning="Those bytes in bits, divided by the weights of the dense model that the folder "
        "stands for; scales, zeros and tables are counted.",
        figure=lambda model: model.footprint.bits_per_weight,
        write=lambda value: f"{value:.2f}",
        better="lower",
        nature="bytes",
    ),
    Column(
        key="perplexity",
        title="Perplexity",
        unit="",
        meaning="e to the mean negative log-probability of each token of the text; ± is its "
        "standard error (delta method, between passages).",
        figure=lambda model: model.perplexity.value,
        write=significant,
        better="lower",
        spread=lambda model: model.perplexity.standard_error,
        nature="text",
        samples=lambda model: model.perplexity.losses,
        logarithmic=True,
    ),
    _quoted_column(
        "gptq",
        "papers on GPTQ quote it: all of the text in windows of 2,048 tokens without overlap",
    ),
    _quoted_column(
        "llama.cpp",
        "llama.cpp's own program measures it: all of the text in windows of 512 tokens, of which "
        "the second half is scored",
    ),
    Column(
        key="bits_per_byte",
        title="Bits per byte",
        unit="",
        meaning="Bits to predict the text, by the bytes that its predicted tokens spell: can be "
        "compared between vocabularies; ± is its standard error, between passages.",
        figure=lambda model: model.perplexity.bits_per_byte,
        write=significant,
        better="lower",
        spread=lambda model: model.perplexity.bits_per_byte_standard_error,
        compact=False,
        nature="text",
        samples=lambda model: model.perplexity.losses,
    ),
    Column(
        key="smoke_accuracy",
        title="Smoke test",
        unit="%",
        meaning="Questions of the small offline set that were answered rightly, log-probabilities "
        "taken for each byte, and the 95% confidence interval (Wilson). Guessing reaches 25%.",
        figure=lambda model: None if model.answers is None else model.answers.accuracy,
        write=_percent,
        better="higher",
        spread=lambda model: None if model.answers is None else model.answers.interval,
        nature="text",
        samples=lambda model: (
            None if model.answers is None else [[float(one)] for one in model.answers.outcomes()]
        ),
    ),
    Column(
        key="mean_kl_nats",
        title="KL",
        unit="nats",
        meaning="Mean of KL(reference || model) per token over the whole vocabulary: 0 for a model "
        "that says exactly what the reference says; ± is its standard error, between passages.",
        figure=_fidelity(lambda found: found.mean_kl),
        write=significant,
        better="lower",
        spread=_fidelity(lambda found: found.kl_standard_error),
        nature="reference",
        samples=_fidelity(lambda found: found.divergences),
    ),
    Column(
        key="mean_parent_kl_nats",
        title="KL to parent",
        unit="nats",
        meaning="The same against the float model that this one was made of: what quantization "
        "alone has cost.",
        figure=_parent(lambda found: found.mean_kl),
        write=significant,
        better="lower",
        spread=_parent(lambda found: found.kl_standard_error),
        compact=False,
        nature="text",
        samples=_parent(lambda found: found.divergences),
    ),
    Column(
        key="kl_99th_percentile_nats",
        title="Worst 1%",
        unit="nats",
        meaning="The divergence that one token in a hundred exceeds: the 99th percentile of KL.",
        figure=_fidelity(lambda found: found.kl_99th_percentile),
        write=significant,
        better="lower",
        compact=False,
        nature="reference",
        samples=_fidelity(lambda found: found.divergences),
        tail=True,
    ),
    Column(
        key="top1_agreement",
        title="Same token",
        unit="%",
        meaning="How often the model and the reference hold the same token for the most probable, "
        "and the 95% confidence interval (Wilson's, for as many independent tokens as the spread "
        "between passages allows).",
        figure=_fidelity(lambda found: found.top1_agreement),
        write=_percent,
        better="higher",
        spread=_fidelity(lambda found: found.agreement_interval),
        nature="reference",
        samples=_fidelity(lambda found: found.agreements),
    ),
    Column(
        key="first_token_ms",
        title="First token",
        unit="ms",
        meaning="From the prompt being handed over to the first token: median of the rounds.",
        figure=lambda model: model.latency.first_token_seconds * 1000,
        write=_whole,
        better="lower",
        nature="clock",
        samples=lambda model: [turn.first_token_seconds for turn in model.latency.turns],
    ),
    Column(
        key="prompt_tokens_per_second",
        title="Reading",
        unit="tok/s",
        meaning="Prompt tokens by the time to the first token: median of the rounds, and "
        "quartiles.",
        figure=lambda model: model.latency.prompt_tokens_per_second,
        write=_rate,
        better="higher",
        spread=lambda model: _outer(model.latency.prompt_quartiles),
        nature="clock",
        samples=lambda model: [
            turn.prompt_tokens / turn.first_token_seconds for turn in model.latency.turns
        ],
    ),
    Column(
        key="decode_tokens_per_second",
        title="Writing",
        unit="tok/s",
        meaning="Tokens written per second after the first: median of the rounds, and quartiles.",
        figure=lambda model: model.latency.decode_tokens_per_second,
        write=_rate,
        better="higher",
        spread=lambda model: _outer(model.latency.decode_quartiles),
        nature="clock",
        samples=lambda model: _rates(model.latency),
    ),
    Column(
        key="transformers_decode_tokens_per_second",
        title="transformers",
        unit="tok/s",
        meaning="The same, written by transformers' own greedy generate: float folders only.",
        figure=_rival(lambda timed: timed.decode_tokens_per_second),
        write=_rate,
        better="higher",
        spread=_rival(lambda timed: _outer(timed.decode_quartiles)),
        compact=False,
        nature="clock",
        samples=_rival(_rates),
    ),
    Column(
        key="joules_per_token",
        title="Energy",
        unit="J/token",
        meaning="Energy that the whole machine spent on every token after the first: median of the "
        "rounds. Only where the machine tells.",
        figure=lambda model: model.latency.joules_per_token,
        write=significant,
        better="lower",
        nature="clock",
        samples=_joules,
    ),
    Column(
        key="peak_memory_mb",
        title="Memory",
        unit="MB",
        meaning="The most that a process which ran only this model ever held, in millions of "
        "bytes: Python, libraries, weights and cache.",
        figure=lambda model: model.footprint.peak_memory_bytes / MEGABYTE,
        write=_whole,
        better="lower",
        nature="memory",
    ),
)
