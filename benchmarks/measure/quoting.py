"""Measure perplexity as papers and tools define it (``benchmarks.figures.conventions``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.figures.conventions import (
    CONVENTIONS,
    QuotedPerplexity,
    cut_windows,
    spelled_bytes,
)
from benchmarks.figures.passages import Passage, fingerprint_of
from mistill.errors import SettingsError
from mistill.text.documents import read_stream
from mistill.text.rows import Texts
from mistill.text.vocabulary import Vocabulary


class Scorer(Protocol):
    """A process that scores passages, as ``benchmarks.measure.children.Child`` does."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""


@dataclass(frozen=True)
class QuotedText:
    """A text as a convention cuts it.

    Attributes:
        convention: Its name.
        windows: Windows, each scored in one pass.
        window_bytes: Bytes that the predicted tokens of each window spell.
        fingerprint: SHA-256 of the tokens and of which of them are predicted.
    """

    convention: str
    windows: Sequence[Passage]
    window_bytes: tuple[int, ...]
    fingerprint: str


def check_quotable(conventions: Sequence[str], name: str, context_length: int) -> None:
    """Refuse a model whose context is too short for a convention.

    Args:
        conventions: The requested ones.
        name: The user's name for the model.
        context_length: Its context in tokens.

    Raises:
        SettingsError: If a window does not fit.
    """
    for convention in conventions:
        needed = CONVENTIONS[convention].context_length
        if context_length < needed:
            raise SettingsError(
                f"{name} has a context of {context_length} tokens, and perplexity in the "
                f"convention of {convention} needs {needed}; leave out {convention}, or the model"
            )


def cut_texts(
    texts: Texts,
    vocabulary: Vocabulary,
    conventions: Sequence[str],
    most_tokens: int | None,
    *,
    skip_bad_rows: bool = False,
) -> list[QuotedText]:
    """Read a text in the windows of each convention.

    Args:
        texts: Files, Hub data sets, ``@demo-held-out``.
        vocabulary: Turns the text into tokens.
        conventions: Their names.
        most_tokens: Read no more than so many tokens; None reads all.
        skip_bad_rows: Whether rows that cannot be read are passed over and counted.

    Returns:
        The text in the windows of each convention.

    Raises:
        SettingsError: If the text is shorter than a window.
    """
    if not conventions:
        return []
    ids = read_stream(texts, vocabulary, skip_bad_rows=skip_bad_rows)[:most_tokens]
    bos_id = vocabulary.bos_id if vocabulary.adds_bos else None
    texts_in_windows = []
    for name in conventions:
        convention = CONVENTIONS[name]
        windows = cut_windows(ids, convention, bos_id)
        if not windows:
            least = convention.context_length
            cut = most_tokens is not None and most_tokens < least
            source = "perplexity_tokens allows" if cut else "the text has"
            raise SettingsError(
                f"{source} {len(ids)} tokens, and perplexity in the convention of {name} needs at "
                f"least {least}; give more, or leave out {name}"
            )
        spelled = spelled_bytes(windows, bytes_in(vocabulary))
        texts_in_windows.append(QuotedText(name, windows, spelled, fingerprint_of(windows)))
    return texts_in_windows


def bytes_in(vocabulary: Vocabulary) -> Callable[[int], int]:
    """A function that gives the bytes of text that a token spells.

    Args:
        vocabulary: The vocabulary of the tokens.

    Returns:
        Token id to bytes; 0 for a special token, such as the end of a turn.
    """
    return lambda token: 0 if vocabulary.is_special(token) else len(vocabulary.token_bytes(token))


def quote(
    scorer: Scorer, text: QuotedText, done: Callable[[], None] = lambda: None
) -> QuotedPerplexity:
    """Measure the perplexity of a model in one convention.

    Args:
        scorer: The process that runs the model.
        text: The text in windows.
        done: Called after every window.

    Returns:
        The losses of every window.
    """
    losses = []
    for window in text.windows:
        answer = scorer.ask("score", ids=window.ids.tolist(), kept=window.kept.tolist())
        losses.append(float(f"{sum(answer['losses']):.8g}"))
        done()
    return QuotedPerplexity(
        convention=text.convention,
        context_length=CONVENTIONS[text.convention].context_length,
        text_fingerprint=text.fingerprint,
        window_losses=tuple(losses),
        window_tokens=tuple(len(window.targets) for window in text.windows),
        window_bytes=text.window_bytes,
    )
