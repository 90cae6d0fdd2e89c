"""Figures of how well a model predicts: the text, the answers to questions, and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.figures.answers import Answers
from benchmarks.figures.column import Column, of_part, percent, significant, whole
from benchmarks.figures.conventions import QuotedPerplexity
from benchmarks.figures.fidelity import Fidelity
from benchmarks.figures.model_result import ModelResult
from benchmarks.figures.replies import Replies
from mistill.measures.shares import simple_interval

Distance = Callable[[ModelResult], Fidelity | None]


def _reference(model: ModelResult) -> Fidelity | None:
    """The distance from the reference; None for the reference."""
    return model.fidelity


def _parent(model: ModelResult) -> Fidelity | None:
    """The distance from the parent; None where there is none."""
    return model.parent_fidelity


def _answers(model: ModelResult) -> Answers | None:
    """The answers to the small offline set; None where they were not requested."""
    return model.answers


def _replies(model: ModelResult) -> Replies | None:
    """The replies to everyday prompts; None where they were not requested."""
    return model.replies


def _distinct_column(length: int, **more: Any) -> Column:
    return Column(
        key=f"distinct_{length}",
        title=f"Distinct-{length}",
        unit="%",
        meaning=f"Different runs of {length} words as a share of all runs within a greedy reply: "
        "100 for a reply that repeats none, little for one that goes round in circles. The mean "
        "over the everyday prompts that ship with mistill; ± is its standard error, between "
        "replies.",
        figure=of_part(_replies, lambda replies: replies.distinct(length)),
        write=percent,
        better="higher",
        spread=of_part(_replies, lambda replies: replies.distinct_error(length)),
        nature="text",
        samples=of_part(_replies, lambda replies: replies.distinct_shares(length)),
        text_fingerprint=of_part(_replies, lambda replies: replies.fingerprint),
        **more,
    )


def _quoted_column(name: str, how: str) -> Column:
    def find(model: ModelResult) -> QuotedPerplexity | None:
        return next((one for one in model.quoted if one.convention == name), None)

    return Column(
        key=f"perplexity_{name.replace('.', '_')}",
        title=f"Perplexity, as {name}",
        unit="",
        meaning=f"The perplexity as {how}; ± is its standard error (delta method, between "
        "windows).",
        figure=of_part(find, lambda quoted: quoted.value),
        write=lambda value: significant(value, 4),
        better="lower",
        spread=of_part(find, lambda quoted: quoted.standard_error),
        compact=False,
        nature="text",
        samples=of_part(
            find,
            lambda quoted: [
                [loss / tokens]
                for loss, tokens in zip(quoted.window_losses, quoted.window_tokens, strict=True)
            ],
        ),
        logarithmic=True,
        text_fingerprint=of_part(find, lambda quoted: quoted.text_fingerprint),
    )


def _divergence_column(find: Distance, take: Callable[[Fidelity], float], **more: Any) -> Column:
    return Column(
        unit="nats",
        figure=of_part(find, take),
        write=significant,
        better="lower",
        samples=of_part(find, lambda fidelity: fidelity.divergences),
        **more,
    )


def _kl_column(find: Distance, **more: Any) -> Column:
    return _divergence_column(
        find,
        lambda fidelity: fidelity.mean_kl,
        spread=of_part(find, lambda fidelity: fidelity.kl_standard_error),
        **more,
    )


QUALITY_COLUMNS = (
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
        "papers on GPTQ define it: all of the text in windows of 2,048 tokens without overlap",
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
        meaning="Bits to predict the text, divided by the bytes that its predicted tokens spell: "
        "can be compared between vocabularies; ± is its standard error, between passages.",
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
        meaning="Questions of the small offline set answered correctly, by log-probability per "
        "byte, and the 95% confidence interval (Wilson). Guessing reaches 25%.",
        figure=of_part(_answers, lambda answers: answers.accuracy),
        write=percent,
        better="higher",
        spread=of_part(_answers, lambda answers: answers.interval),
        nature="text",
        samples=of_part(_answers, lambda answers: [[float(one)] for one in answers.outcomes()]),
        text_fingerprint=of_part(_answers, lambda answers: answers.fingerprint),
    ),
    _distinct_column(2, compact=False),
    _distinct_column(3),
    Column(
        key="most_repeats",
        title="Repeats",
        unit="",
        meaning="The largest number of times that one run of four words stands in one of these "
        "replies.",
        figure=of_part(_replies, lambda replies: float(replies.most_repeats)),
        write=whole,
        better="lower",
        nature="text",
        text_fingerprint=of_part(_replies, lambda replies: replies.fingerprint),
    ),
    Column(
        key="looping_replies",
        title="Looping",
        unit="%",
        meaning="How many of these replies hold a run of four words more than three times, and "
        "the 95% confidence interval (Wilson).",
        figure=of_part(_replies, lambda replies: sum(replies.loops) / len(replies.loops)),
        write=percent,
        better="lower",
        spread=of_part(
            _replies, lambda replies: simple_interval(sum(replies.loops), len(replies.loops))
        ),
        compact=False,
        nature="text",
        samples=of_part(_replies, lambda replies: [[float(loops)] for loops in replies.loops]),
        text_fingerprint=of_part(_replies, lambda replies: replies.fingerprint),
    ),
    _kl_column(
        _reference,
        key="mean_kl_nats",
        title="KL",
        meaning="Mean of KL(reference || model) per token over the whole vocabulary: 0 for a model "
        "that predicts exactly what the reference predicts; ± is its standard error, between "
        "passages.",
        nature="reference",
    ),
    _kl_column(
        _parent,
        key="mean_parent_kl_nats",
        title="KL to parent",
        meaning="KL against the float model that this one was made from: the loss by quantization "
        "alone.",
        compact=False,
        nature="text",
    ),
    _divergence_column(
        _reference,
        lambda fidelity: fidelity.kl_99th_percentile,
        key="kl_99th_percentile_nats",
        title="Worst 1%",
        meaning="The divergence that one token in a hundred exceeds: the 99th percentile of KL.",
        compact=False,
        nature="reference",
        tail=True,
    ),
    Column(
        key="top1_agreement",
        title="Same token",
        unit="%",
        meaning="How often the most probable token of the model and of the reference is the same, "
        "and the 95% confidence interval (Wilson's, for the effective number of independent "
        "tokens, from the variance between passages).",
        figure=of_part(_reference, lambda fidelity: fidelity.top1_agreement),
        write=percent,
        better="higher",
        spread=of_part(_reference, lambda fidelity: fidelity.agreement_interval),
        nature="reference",
        samples=of_part(_reference, lambda fidelity: fidelity.agreements),
    ),
)
