"""Special tokens that somebody typed in a message are text, not marks of the conversation.

A message that holds ``<|im_end|>`` would otherwise end its turn and could begin another in the
name of the system. Before the chat template renders a conversation, each special token that is
written out in it is exchanged for as many characters that stand for it, from the end of Unicode's
private use area. Where they come back in the rendered text, what they stand for is tokenized as
text. A conversation in which none is typed keeps its tokens: it is not touched.

What the assistant says may hold special tokens of its own, such as the mark that opens its
thoughts; of those only the ones with which a template builds turns are taken for text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mistill.errors import TextError, VocabularyError
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import TokenSpans, Vocabulary

# The last private use plane, below its end, which tests of Unicode like to use.
_FIRST = 0x100000
_LAST = 0x10F000
_THOUGHTS = re.compile(r"[<\[]/?(think|thinking|thought|thoughts|reasoning)[>\]]", re.IGNORECASE)


def with_typed_marks_hidden(talk: Conversation, vocabulary: Vocabulary) -> Conversation:
    """Exchange the special tokens that are typed in a conversation for characters.

    Args:
        talk: Any conversation.
        vocabulary: Its special tokens and chat template.

    Returns:
        The same object if none is typed; else one to be rendered, and encoded by
        ``encode_conversation``.

    Raises:
        TextError: If it also holds the characters that would stand for them, or the template
            changes them.
    """
    typed = _Typed(vocabulary)
    if not typed.marks or not typed.found_in([talk.messages, talk.tools, talk.documents]):
        return talk
    hidden = replace(
        talk,
        messages=tuple(typed.hide(message, _is_assistant(message)) for message in talk.messages),
        tools=typed.hide(talk.tools),
        documents=typed.hide(talk.documents),
        variables=typed.hide(talk.variables),
    )
    if hidden == talk:
        return talk
    asks = talk.messages[-1].get("role") != "assistant"
    text = talk.render(vocabulary, add_generation_prompt=asks)
    if any(_FIRST <= ord(letter) <= _LAST for letter in text):
        raise TextError(
            "the conversation holds special tokens that are typed, and characters of the private "
            "use planes of Unicode, which stand for them; leave one of the two out"
        )
    if typed.show(hidden.render(vocabulary, add_generation_prompt=asks)) != text:
        raise TextError(
            "the chat template changes the special tokens that are typed in this conversation, so "
            "that they cannot be told from its own marks; leave them out"
        )
    return hidden


def encode_conversation(text: str, vocabulary: Vocabulary, *, hidden: bool) -> TokenSpans:
    """Turn a rendered conversation into token ids and their positions in the text.

    Args:
        text: From the chat template.
        vocabulary: Turns it into tokens.
        hidden: Whether the conversation came changed from ``with_typed_marks_hidden``.

    Returns:
        Ids and the character at which each begins.

    Raises:
        TextError: If the text holds half of a character, or characters that the tokenizer takes
            for a special token which is not written there.
        VocabularyError: If the text holds a token for which the model has no row.
    """
    spans = vocabulary.encode_spans(text)
    typed = _Typed(vocabulary)
    typed.refuse_look_alikes(text, spans)
    if not hidden:
        return spans
    ids: list[int] = []
    starts: list[int] = []
    pieces = _pieces(text, spans, vocabulary)
    for begin, end, first, last in pieces:
        piece = text[begin:end]
        shown = typed.show(piece)
        if shown == piece:
            ids += spans.ids[first:last].tolist()
            starts += spans.starts[first:last].tolist()
        else:
            inner = vocabulary.encode_as_text(shown, at_start=begin == 0)
            ids += inner.ids.tolist()
            starts += (inner.starts + begin).tolist()
    return TokenSpans(np.array(ids, np.int64), np.array(starts, np.int64))


def _pieces(
    text: str, spans: TokenSpans, vocabulary: Vocabulary
) -> list[tuple[int, int, int, int]]:
    """The runs between the template's own special tokens, and those tokens.

    Each is where it begins and ends in the text, and its first token and that after the last.
    """
    ids, starts = spans.ids.tolist(), spans.starts.tolist()
    special = [
        vocabulary.is_mark(token) and _spells(text, start, token, vocabulary)
        for token, start in zip(ids, starts, strict=True)
    ]
    pieces = []
    first = 0
    for number in range(len(ids) + 1):
        if number < len(ids) and not special[number]:
            continue
        if number > first:
            end = starts[number] if number < len(ids) else len(text)
            pieces.append((starts[first], end, first, number))
        if number < len(ids):
            end = starts[number + 1] if number + 1 < len(ids) else len(text)
            pieces.append((starts[number], end, number, number + 1))
        first = number + 1
    return pieces


def _spells(text: str, start: int, token: int, vocabulary: Vocabulary) -> bool:
    spelled = vocabulary.token_bytes(token).decode("utf-8", "replace")
    return bool(spelled) and text[start:].lstrip().startswith(spelled.strip())


def _is_assistant(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant"


class _Typed:
    """The special tokens of a vocabulary, and the character that stands for each."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.marks = tuple(mark for mark in vocabulary.mark_texts if mark.strip())
        self._letters = {mark: chr(_FIRST + number) for number, mark in enumerate(self.marks)}
        self._originals = {letter: mark for mark, letter in self._letters.items()}
        self._any = _one_of(self.marks)
        self._vocabulary = vocabulary
        self._structure: re.Pattern[str] | None = None

    def found_in(self, value: Any) -> bool:
        """Whether a mark is typed in a value of JSON."""
        if isinstance(value, str):
            return self._any.search(value) is not None
        if isinstance(value, Mapping):
            return any(map(self.found_in, value.values()))
        return isinstance(value, list | tuple) and any(map(self.found_in, value))

    def hide(self, value: Any, assistant: bool = False) -> Any:
        """A value of JSON with the characters that stand for the marks in it."""
        if isinstance(value, str):
            pattern = self._of_structure() if assistant else self._any
            return pattern.sub(lambda mark: self._letters[mark[0]] * len(mark[0]), value)
        if isinstance(value, Mapping):
            return {name: self.hide(item, assistant) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item, assistant) for item in value]
        return value

    def show(self, text: str) -> str:
        """The text with the marks in place of the characters that stand for them."""
        for letter, mark in self._originals.items():
            if letter in text:
                text = text.replace(letter * len(mark), mark)
        return text

    def refuse_look_alikes(self, text: str, spans: TokenSpans) -> None:
        """Refuse a text of which a tokenizer that normalizes makes more marks than it holds."""
        vocabulary = self._vocabulary
        unknown = vocabulary.special_tokens.get("unk_token")
        marks = [token for token in spans.ids.tolist() if vocabulary.is_mark(token)]
        if unknown is not None:  # what it cannot spell is no mark
            marks = [token for token in marks if vocabulary.token_bytes(token) != unknown.encode()]
        written = sum(mark != unknown for mark in self._any.findall(text)) if marks else 0
        if len(marks) > written:
            raise TextError(
                "the conversation holds characters that the tokenizer takes for special tokens "
                "although they are none, such as full-width ones; leave them out"
            )

    def _of_structure(self) -> re.Pattern[str]:
        """The marks with which the chat template builds turns, and those that have a name."""
        if self._structure is None:
            turns = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "?"},
                {"role": "user", "content": "?"},
            ]
            try:
                text = self._vocabulary.render(turns, add_generation_prompt=True)
            except (TextError, VocabularyError):
                text = ""
            ends = {
                self._vocabulary.token_bytes(token).decode("utf-8", "replace")
                for token in self._vocabulary.end_ids
            }
            named = {*self._vocabulary.special_tokens.values(), *ends}
            marks = [
                mark
                for mark in self.marks
                if (mark in text or mark in named) and not _THOUGHTS.fullmatch(mark)
            ]
            self._structure = _one_of(marks)
        return self._structure


def _one_of(marks: tuple[str, ...] | list[str]) -> re.Pattern[str]:
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
