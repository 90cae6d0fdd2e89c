"""A tokenizer and its chat template, read from a folder without transformers.

A laptop that chats has no transformers: the library ``tokenizers`` reads ``tokenizer.json``, and
jinja2 renders the chat template as transformers does. Two vocabularies are equal if every id spells
the same bytes in both, not if their sizes are equal: the 32,000 tokens of Llama 2 are not the
32,000 tokens of Mistral v0.1.

It is one file because a vocabulary is one class, and all of its methods need what its ids spell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from mistill.errors import TextError, VocabularyError
from mistill.folders.folder import TEKKEN_FILE
from mistill.folders.schemas import optional_json
from mistill.text.chat_template import render_template, template_turn
from mistill.text.spelling import speller_of
from mistill.text.tokenizer_file import TokenizerFile, read_tokenizer
from mistill.text.tokenizer_settings import (
    adds_bos,
    adds_eos,
    read_special_tokens,
    read_templates,
)

# A turn: role, content, and what else the turn says, such as tool_calls or reasoning_content.
Message = Mapping[str, Any]


# A token that no vocabulary has, of the last plane of private use.
_BEFORE = "\U0010fffd"


class TokenSpans(NamedTuple):
    """The tokens of a text, and where each begins in it.

    Attributes:
        ids: Token ids, int64, shape (T,).
        starts: Character at which each token begins, int64, shape (T,).
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]


def load_vocabulary(folder: str | Path, *, today: date | None = None) -> Vocabulary:
    """Read the tokenizer and the chat template of a folder.

    Args:
        folder: A model folder of any form.
        today: The day that a template which writes the date is told; None tells it the time at
            which it renders.

    Returns:
        The vocabulary.

    Raises:
        VocabularyError: If there is no tokenizer, or one of a kind that mistill does not read.
    """
    path = Path(folder).expanduser()
    file = path / "tokenizer.json"
    if not path.is_dir():
        raise VocabularyError(f"{folder}: there is no such folder")
    if not file.is_file():
        content = "no tokenizer.json"
        if (path / "tokenizer.model").is_file():
            content = "only tokenizer.model; mistill.save_model makes a folder with tokenizer.json"
        elif (path / TEKKEN_FILE).is_file():
            content = "only tekken.json; put the tokenizer.json of its transformers version there"
        raise VocabularyError(f"{folder} holds {content}")
    vocabulary = Vocabulary(path, read_tokenizer(file))
    vocabulary.today = today
    return vocabulary


class Vocabulary:
    """The tokens of a model and its chat template.

    ``load_vocabulary`` is the way to get one. ``size`` counts the rows of the model's embedding,
    V, some of which may stand for no token. ``adds_bos`` says whether plain text begins with the
    token ``bos_id``, and ``files_agree_on_bos`` whether tokenizer.json says so too; a template
    writes its own. ``added_tokens`` holds the entries of all files, ``special_tokens`` bos_token,
    eos_token and the like by name, and ``chat_template`` the template as the folder has it.
    A template that writes the date is told ``today``; None tells it the time at which it renders.

    Args:
        folder: The folder of the configuration files.
        file: Its tokenizer.json.
    """

    def __init__(self, folder: Path, file: TokenizerFile) -> None:
        tokenizer, definition = file.tokenizer, file.definition
        self._folder = folder
        self._file = file
        self._tokenizer = tokenizer
        self.added_tokens: list[dict[str, Any]] = definition["added_tokens"]
        self._spell = speller_of(definition)
        settings = optional_json(folder / "tokenizer_config.json")
        config = optional_json(folder / "config.json")
        self.size = int(config.get("vocab_size", file.last_id + 1))
        self.today: date | None = None
        self._templates = read_templates(folder, settings)
        self.chat_template = self._templates.get("default")
        self.special_tokens = read_special_tokens(folder, settings)
        generation = optional_json(folder / "generation_config.json")
        self.bos_id = self._first_id(
            self.special_tokens.get("bos_token"), generation, config, "bos_token_id"
        )
        first = None if self.bos_id is None else str(tokenizer.id_to_token(self.bos_id))
        self.adds_bos = first is not None and adds_bos(settings, file.processor, first)
        self.files_agree_on_bos = first is None or self.adds_bos == adds_bos(
            {}, file.processor, first
        )
        eos_token = self.special_tokens.get("eos_token")
        self.eos_id = None if eos_token is None else tokenizer.token_to_id(eos_token)
        self.adds_eos = self.eos_id is not None and adds_eos(
            settings, file.processor, str(tokenizer.id_to_token(self.eos_id))
        )
        self._configured_ends = (*_ids_of(generation), *_ids_of(config))

    def __repr__(self) -> str:
        return f"Vocabulary({str(self._folder)!r}, size={self.size})"

    @property
    def folder(self) -> Path:
        """The folder that it was read from."""
        return self._folder

    @property
    def tool_template(self) -> str | None:
        """The template of conversations in which tools may be called, as the folder has it."""
        return self._templates.get("tool_use", self.chat_template)

    @property
    def date_key(self) -> dict[str, str]:
        """What the text of a conversation depends on besides its words: the day, if it is written.

        A part of the key of work that resumes.
        """
        writes = any("strftime_now" in template for template in self._templates.values())
        return {"date": self.today.isoformat()} if self.today is not None and writes else {}

    # --- text to tokens and back ----------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, without adding special tokens.

        Special tokens that are written out in the text, as a rendered conversation has them,
        become the tokens they name.

        Args:
            text: Any text.

        Returns:
            Token ids.

        Raises:
            TextError: If the text holds half of a character.
            VocabularyError: If the text holds a token for which the model has no row.
        """
        ids: list[int] = self._file.encode(text).ids
        self._check(ids)
        return ids

    def encode_spans(self, text: str) -> TokenSpans:
        """Turn text into token ids and their positions in the text.

        Args:
            text: Any text.

        Returns:
            Ids and the character at which each begins; tokens that share a character share it.

        Raises:
            TextError: If the text holds half of a character.
            VocabularyError: If the text holds a token for which the model has no row.
        """
        encoding = self._file.encode(text)
        ids = np.array(encoding.ids, np.int64)
        self._check(ids)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return TokenSpans(ids, offsets[:, 0])

    def encode_as_text(self, text: str, *, at_start: bool = False) -> TokenSpans:
        """Turn text into tokens where special tokens that are written out in it are text too.

        Args:
            text: A part of a rendered conversation.
            at_start: Whether it is the beginning, before which some tokenizers put a space.

        Returns:
            Ids and the character at which each begins.

        Raises:
            VocabularyError: If the text holds a token for which the model has no row.
        """
        # Behind a token of another kind the text is cut as behind a mark of the template.
        before = "" if at_start else _BEFORE
        encoding = self._splitting.encode(before + text)
        skipped = len(before)
        ids = np.array(encoding.ids[skipped:], np.int64)
        self._check(ids)
        offsets = np.array(encoding.offsets[skipped:], np.int64).reshape(-1, 2)
        return TokenSpans(ids, offsets[:, 0] - skipped)

    @property
    def mark_texts(self) -> tuple[str, ...]:
        """What the special tokens spell, and the other marks with which a template builds turns."""
        return tuple(
            entry["content"]
            for entry in self.added_tokens
            if self.is_mark(entry["id"]) and entry["id"] < self.size
        )

    def is_mark(self, token: int) -> bool:
        """Whether a token is special, or another with which the chat template builds turns.

        Args:
            token: A token id.

        Returns:
            True for what nobody's message may become.
        """
        return self.is_special(token) or token in self._plain_turn_marks

    @cached_property
    def _plain_turn_marks(self) -> frozenset[int]:
        """Added tokens that are not called special, and that the template writes of itself."""
        plain = [entry for entry in self.added_tokens if not entry.get("special")]
        if not plain or self.chat_template is None:
            return frozenset()
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "?"},
            {"role": "user", "content": "?"},
        ]
        try:
            rendered_ids = set(self.encode(self.render(turns, add_generation_prompt=True)))
        except (TextError, VocabularyError):
            return frozenset()
        return frozenset(entry["id"] for entry in plain if entry["id"] in rendered_ids)

    @cached_property
    def _splitting(self) -> TokenizerFile:
        """The same tokenizer, to which special tokens and marks of turns are text."""
        definition = json.loads(self._tokenizer.to_str())
        for entry in definition["added_tokens"]:
            if entry["id"] in self._plain_turn_marks:
                entry["special"] = True
        tokenizer = Tokenizer.from_str(json.dumps(definition))
        tokenizer.add_tokens([AddedToken(_BEFORE, normalized=False)])
        tokenizer.encode_special_tokens = True
        return replace(self._file, tokenizer=tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text, special tokens included.

        Args:
            ids: Token ids; those that stand for no token are left out.

        Returns:
            The text; bytes that are no UTF-8 become U+FFFD.
        """
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What a token spells, before neighbouring bytes are joined into characters.

        Args:
            token: A token id below ``size``.

        Returns:
            Its bytes; empty for a row that stands for no token.

        Raises:
            VocabularyError: If the id is not below ``size``.
        """
        if not 0 <= token < self.size:
            raise VocabularyError(f"there is no token {token}: ids run from 0 to {self.size - 1}")
        return self._bytes[token] if token < len(self._bytes) else b""

    def is_padding(self, token: int) -> bool:
        """Whether a row of the model stands for no token.

        Args:
            token: A token id below ``size``.

        Returns:
            True for the rows that only round the embedding up to a convenient size.
        """
        return token >= len(self._bytes) or token in self._unassigned

    def is_special(self, token: int) -> bool:
        """Whether a token is a special token, such as the end of a turn.

        Args:
            token: A token id.

        Returns:
            True for the tokens that tokenizer.json calls special.
        """
        return token in self._special_ids

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens at which a reply ends.

        The end-of-sequence tokens that generation_config.json, config.json and the tokenizer
        name, and the token that the chat template writes after an assistant's turn.
        """
        end = self.special_tokens.get("eos_token")
        tokenizer_end = None if end is None else self._tokenizer.token_to_id(end)
        ids = [*self._configured_ends, tokenizer_end, self._end_of_turn()]
        return tuple(dict.fromkeys(i for i in ids if i is not None and 0 <= i < self.size))

    # --- conversations --------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Render a conversation with the chat template.

        The same text as transformers' ``apply_chat_template``. It holds its own
        beginning-of-sequence token where the model wants one.

        Args:
            messages: Turns with ``role`` and ``content``, and whatever else the template writes,
                such as ``tool_calls`` and ``reasoning_content``.
            add_generation_prompt: Whether to end where the assistant's next turn begins.
            tools: Tools that the assistant may call, as JSON schemas.
            documents: Documents that the assistant may quote.
            variables: More of what the template asks for, such as ``enable_thinking``.

        Returns:
            The text, to be given to ``encode``.

        Raises:
            VocabularyError: If the folder has no chat template, or one with a mistake in it, or
                one that takes too long or too much memory.
            TextError: If the template refuses the conversation.
        """
        source = self.chat_template if tools is None else self.tool_template
        if source is None:
            raise VocabularyError(
                f"{self._folder} has no chat template; use a chat model, or put one into "
                "chat_template.jinja"
            )
        return render_template(
            source,
            [template_turn(message) for message in messages],
            {
                **self.special_tokens,
                **variables,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            },
            today=self.today,
            origin=str(self._folder),
        )

    # --- identity -------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """A hash of what every id spells, without the rows that stand for no token.

        Returns:
            64 hexadecimal digits, equal for two vocabularies with the same tokens.
        """
        digest = hashlib.sha256()
        for token, spelled in enumerate(self._bytes):
            digest.update(self._kind(token).encode())
            digest.update(len(spelled).to_bytes(4, "little"))
            digest.update(spelled)
        return digest.hexdigest()

    def spelling(self, token: int) -> str:
        """A token as error messages show it.

        Args:
            token: A token id below ``size``.

        Returns:
            Its text in quotes, or ``nothing``.
        """
        if self.is_padding(token):
            return "nothing"
        return repr(self.token_bytes(token).decode("utf-8", "backslashreplace"))

    @cached_property
    def _bytes(self) -> list[bytes]:
        """What each id spells; an id in a gap spells nothing, and trailing padding is absent."""
        spell = self._spell
        added = {entry["id"]: entry["content"] for entry in self.added_tokens}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        spelled = {token: spell(text) for text, token in vocabulary.items() if token not in added}
        spelled |= {token: text.encode() for token, text in added.items()}
        last = max((token for token in spelled if token < self.size), default=-1)
        return [spelled.get(token, b"") for token in range(last + 1)]

    @cached_property
    def _unassigned(self) -> frozenset[int]:
        assigned = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        return frozenset(set(range(len(self._bytes))) - assigned)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(entry["id"] for entry in self.added_tokens if entry.get("special"))

    def _kind(self, token: int) -> str:
        if token in self._unassigned:
            return "-"
        return "s" if self.is_special(token) else "t"

    def _end_of_turn(self) -> int | None:
        """The special token that the template writes right after an assistant's turn."""
        if self.chat_template is None:
            return None
        reply = "The answer is 42"
        try:
            text = self.render(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}]
            )
        except TextError:
            return None
        _, occurs, after = text.rpartition(reply)
        after = after.lstrip()
        marks = [entry for entry in self.added_tokens if entry.get("special")]
        matching = [entry for entry in marks if occurs and after.startswith(entry["content"])]
        longest = max(matching, key=lambda entry: len(entry["content"]), default=None)
        return None if longest is None else int(longest["id"])

    def _first_id(
        self,
        token: str | None,
        generation: Mapping[str, Any],
        config: Mapping[str, Any],
        name: str,
    ) -> int | None:
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        for value in (token_id, generation.get(name), config.get(name)):
            if isinstance(value, int) and 0 <= value < self.size:
                return value
        return None

    def _check(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        largest = max(ids, default=0) if isinstance(ids, list) else int(np.max(ids, initial=0))
        if largest >= self.size:
            raise VocabularyError(
                f"the text holds the token {self._tokenizer.id_to_token(largest)!r} with id "
                f"{largest}, but the model of {self._folder} has only {self.size} rows"
            )


def same_vocabulary(ours: Vocabulary, theirs: Vocabulary) -> list[str]:
    """Compare two vocabularies by what every id spells.

    Args:
        ours: One vocabulary.
        theirs: The other vocabulary.

    Returns:
        One phrase for each difference; empty if a token id means the same in both.
    """
    differences = []
    if ours.size != theirs.size:
        differences.append(f"{ours.size} rows against {theirs.size}")
    shared = min(ours.size, theirs.size)
    differing = [
        token
        for token in range(shared)
        if ours.token_bytes(token) != theirs.token_bytes(token)
        or ours.is_padding(token) != theirs.is_padding(token)
        or ours.is_special(token) != theirs.is_special(token)
    ]
    if differing:
        first = differing[0]
        differences.append(
            f"{len(differing)} of {shared} ids stand for different tokens, the first of them "
            f"{first}: {_shown(ours, first)} against {_shown(theirs, first)}"
        )
    return differences


def _shown(vocabulary: Vocabulary, token: int) -> str:
    mark = " (special)" if vocabulary.is_special(token) else ""
    return vocabulary.spelling(token) + mark


# --- reading the folder -------------------------------------------------------------------------


def _ids_of(config: Mapping[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int)]
