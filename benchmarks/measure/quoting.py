"""Measure perplexity in the conventions that people quote (``benchmarks.figures.conventions``)."""

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
        """Ask for something and wait for it."""


@dataclass(frozen=True)
class QuotedText:
    """A text as a convention cuts it.

    Attributes:
        convention: Its name.
        windows: What is scored at once.
        window_bytes: Bytes that the predicted tokens of each window spell.
        fingerprint: Of the tokens and of which of them count.
    """

    convention: str
    windows: Sequence[Passage]
    window_bytes: tuple[int, ...]
    fingerprint: str


def check_quotable(conventions: Sequence[str], name: str, context_length: int) -> None:
    """Refuse a model whose context is too short for a convention.

    Args:
        conventions: Those that are asked for.
        name: What the user calls the model.
        context_length: Positions that it holds.

    Raises:
        SettingsError: If a window does not fit.
    """
    for convention in conventions:
        needed = CONVENTIONS[convention].context_length
        if context_length < needed:
            raise SettingsError(
                f"{name} holds {context_length} positions, and perplexity as {convention} quotes "
                f"it reads {needed} at once; leave {convention} out, or the model"
            )


def cut_texts(
    texts: Texts, vocabulary: Vocabulary, conventions: Sequence[str], most_tokens: int | None
) -> list[QuotedText]:
    """Read a text as each convention does.

    Args:
        texts: Files, Hub data sets, ``@demo-held-out``.
        vocabulary: What the text is written in.
        conventions: Their names.
        most_tokens: Read no more than so many tokens; None reads all.

    Returns:
        The text in the windows of each convention.

    Raises:
        SettingsError: If the text is shorter than a window.
    """
    if not conventions:
        return []
    ids = read_stream(texts, vocabulary)[:most_tokens]
    bos_id = vocabulary.bos_id if vocabulary.adds_bos else None
    found = []
    for name in conventions:
        convention = CONVENTIONS[name]
        windows = cut_windows(ids, convention, bos_id)
        if not windows:
            least = convention.context_length
            cut = most_tokens is not None and most_tokens < least
            what = "perplexity_tokens allows" if cut else "the text has"
            raise SettingsError(
                f"{what} {len(ids)} tokens, and perplexity as {name} quotes it needs at least "
                f"{least}; give more, or leave {name} out"
            )
        spelled = spelled_bytes(windows, bytes_in(vocabulary))
        found.append(QuotedText(name, windows, spelled, fingerprint_of(windows)))
    return found


def bytes_in(vocabulary: Vocabulary) -> Callable[[int], int]:
    """How many bytes of text a token spells.

    Args:
        vocabulary: Whose tokens.

    Returns:
        Bytes of a token; 0 for a mark, such as the end of a turn.
    """
    return lambda token: 0 if vocabulary.is_special(token) else len(vocabulary.token_bytes(token))


def quote(
    scorer: Scorer, text: QuotedText, done: Callable[[], None] = lambda: None
) -> QuotedPerplexity:
    """Let a model predict a text as a convention wants it.

    Args:
        scorer: The process that runs the model.
        text: The text in windows.
        done: Called after every window.

    Returns:
        What was found.
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
