"""Prompts and answers as token ids, as mistill renders them everywhere.

The conversation of a prompt and an answer is rendered and tokenized as one text, and the tokens
that the assistant writes, with the one that ends its turn, are the answer. The two answers of a
pair may fuse with the end of the prompt in different ways, so that each keeps a prompt of its own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mistill.errors import TextError
from mistill.preferences.shapes import Labelled, Pair
from mistill.text.answers import conversation_documents
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import Message, Vocabulary

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A prompt and an answer to it.

    Attributes:
        ids: Token ids of both; the last one ends the answer.
        start: Number of tokens of the prompt.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class PairTokens:
    """Both answers of a pair.

    Attributes:
        chosen: The better one.
        rejected: The other one.
        margin: By how much the better one was scored higher; None where it was not scored.
    """

    chosen: Answer
    rejected: Answer
    margin: float | None = None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Both, the better one first."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class LabelledTokens:
    """An answer with its label.

    Attributes:
        answer: The answer.
        good: Whether it is wanted.
    """

    answer: Answer
    good: bool

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The answer alone."""
        return (self.answer,)


def answer_tokens(
    prompt: Conversation, answer: Message, vocabulary: Vocabulary, origin: str
) -> Answer:
    """Tokens of a prompt and an answer.

    Args:
        prompt: Turns up to the answer.
        answer: The assistant's turn.
        vocabulary: With a chat template.
        origin: File and line, for messages.

    Returns:
        The tokens up to the end of the answer.

    Raises:
        TextError: If the template refuses the conversation or does not write all of it.
        VocabularyError: If there is no chat template.
    """
    earlier = (n for n, turn in enumerate(prompt.messages) if turn["role"] == "assistant")
    talk = replace(prompt, messages=(*prompt.messages, answer), unlearned=frozenset(earlier))
    try:
        (document,) = conversation_documents(talk, vocabulary)
    except TextError as error:
        raise TextError(f"{origin}: {error}") from error
    places = np.flatnonzero(document.mask)
    if not len(places):
        raise TextError(f"{origin}: the chat template writes nothing of the answer")
    return Answer(tuple(document.ids[: places[-1] + 1].tolist()), int(places[0]))


def pair_tokens(
    pairs: Sequence[Pair], vocabulary: Vocabulary, longest: int, *, name: str
) -> list[PairTokens]:
    """Pairs as tokens; those longer than a limit are left out and counted in a warning.

    Args:
        pairs: From ``read_pairs``.
        vocabulary: With a chat template.
        longest: Most tokens of a prompt and an answer.
        name: What the pairs are for, for messages.

    Returns:
        The others, in their order.

    Raises:
        TextError: If a template refuses one, or none is short enough.
        VocabularyError: If there is no chat template.
    """
    tokens = [
        PairTokens(
            answer_tokens(pair.prompt, pair.chosen, vocabulary, pair.origin),
            answer_tokens(pair.prompt, pair.rejected, vocabulary, pair.origin),
            pair.margin,
        )
        for pair in pairs
    ]
    return _short(tokens, vocabulary, longest, name)


def labelled_tokens(
    labelled: Sequence[Labelled], vocabulary: Vocabulary, longest: int, *, name: str
) -> list[LabelledTokens]:
    """Labelled answers as tokens; those longer than a limit are left out and counted in a warning.

    Args:
        labelled: From ``read_labelled``.
        vocabulary: With a chat template.
        longest: Most tokens of a prompt and an answer.
        name: What the answers are for, for messages.

    Returns:
        The others, in their order.

    Raises:
        TextError: If a template refuses one, or none is short enough.
        VocabularyError: If there is no chat template.
    """
    tokens = [
        LabelledTokens(answer_tokens(item.prompt, item.answer, vocabulary, item.origin), item.good)
        for item in labelled
    ]
    return _short(tokens, vocabulary, longest, name)


def _short(items: list[Any], vocabulary: Vocabulary, longest: int, name: str) -> list[Any]:
    short = [item for item in items if max(len(one.ids) for one in item.answers) <= longest]
    if not short:
        raise TextError(
            f"none of the {len(items)} rows of {name} has at most {longest} tokens; raise "
            "max_length"
        )
    if len(short) < len(items):
        _log.warning(
            "%d of %d rows of %s are left out: they are longer than %d tokens (max_length)",
            len(items) - len(short),
            len(items),
            name,
            longest,
        )
    if not any(one.ids[-1] in vocabulary.end_ids for item in short for one in item.answers):
        _log.warning(
            "%s: the chat template ends no answer with a token at which replies end, so that a "
            "model does not learn from it to stop",
            name,
        )
    return short


def digest_of(items: Iterable[PairTokens | LabelledTokens]) -> str:
    """A hash of all token ids, lengths of prompts, margins and labels, in their order.

    Args:
        items: Pairs or labelled answers.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for item in items:
        judgement = item.margin if isinstance(item, PairTokens) else item.good
        answers = [(one.start, one.ids) for one in item.answers]
        digest.update(repr((answers, judgement)).encode())
    return digest.hexdigest()
