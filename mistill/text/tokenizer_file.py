"""tokenizer.json as a tokenizer, whoever wrote it.

The library ``tokenizers`` trusts its file: a normalizer may multiply text until the memory is gone,
and a regular expression that gives up ends in a panic of Rust, which is not an ``Exception``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from tokenizers import Encoding, Tokenizer

from mistill.errors import TextError, VocabularyError
from mistill.folders.folder import TEKKEN_FILE
from mistill.folders.json_text import check
from mistill.folders.schemas import read_json
from mistill.text.added_tokens import add_missing_tokens

# Bytes that may become of one byte of text; a space becomes the three bytes of a mark in many.
_MOST_GROWTH = 64
_Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class _AddedToken(Struct, kw_only=True):
    id: _Id
    content: str
    special: bool = False


class _Tokens(Struct, kw_only=True):
    tokens: list[str] = []


class Processor(Struct, kw_only=True):
    """The post-processor, as far as it says which tokens are put before a text.

    Attributes:
        type: Its kind.
        processors: Those of a sequence.
        single: What a single text becomes: ``SpecialToken`` and ``Sequence`` by name, in order.
        special_tokens: What each special token stands for.
    """

    type: str
    processors: list[Processor] = []
    single: list[dict[str, dict[str, Any]]] = []
    special_tokens: dict[str, _Tokens] = {}

    def puts(self, token: str, *, first: bool) -> bool:
        """Whether it puts a token before or after every text.

        Args:
            token: The token.
            first: Whether before; else after.

        Returns:
            True if the first or the last thing of a single text is that token.
        """
        if self.type == "Sequence":
            return any(part.puts(token, first=first) for part in self.processors)
        if self.type != "TemplateProcessing" or not self.single:
            return False
        edge = self.single[0 if first else -1].get("SpecialToken", {}).get("id")
        return edge in self.special_tokens and token in self.special_tokens[edge].tokens


class _Definition(Struct, kw_only=True):
    added_tokens: list[_AddedToken] | None = None
    post_processor: Processor | None = None
    model: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


@dataclass(frozen=True)
class TokenizerFile:
    """What tokenizer.json holds.

    Attributes:
        tokenizer: The tokenizer without its post-processor, so that it adds no special tokens and
            leaves offsets alone.
        definition: The document.
        processor: The post-processor; None if there is none.
        file: Path of the file.
        last_id: The highest id of a token, added ones included; -1 where there is none.
    """

    tokenizer: Tokenizer
    definition: dict[str, Any]
    processor: Processor | None
    file: Path
    last_id: int

    def encode(self, text: str) -> Encoding:
        """Turn text into tokens, without adding special ones.

        Args:
            text: Any text.

        Returns:
            Ids and offsets.

        Raises:
            TextError: If the text holds half a character.
            VocabularyError: If the tokenizer fails at the text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            raise TextError(
                f"the text is not UTF-8: it holds half of a character, {half}"
            ) from None
        try:
            with _without_panics(self._may_panic):
                return self.tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise VocabularyError(
                f"{self.file} cannot split this text into tokens: {error}"
            ) from error

    @cached_property
    def _may_panic(self) -> bool:
        parts = [self.definition.get(name) for name in ("normalizer", "pre_tokenizer")]
        return '"Regex"' in json.dumps(parts)


def read_tokenizer(file: Path) -> TokenizerFile:
    """Read a tokenizer.json.

    Args:
        file: Path of the file.

    Returns:
        The tokenizer.

    Raises:
        FolderError: If it is missing or not JSON.
        VocabularyError: If it is not a tokenizer, or one that would multiply a text.
    """
    definition = read_json(file)
    if "model" not in definition and isinstance(definition.get("vocab"), list):
        raise VocabularyError(
            f"{file} is a {TEKKEN_FILE} under another name, which mistill does not read; put the "
            "tokenizer.json of the model's transformers version there"
        )
    try:
        parsed: _Definition = check(definition, _Definition, "it", VocabularyError)
    except VocabularyError as error:
        raise VocabularyError(f"{file} is not a tokenizer: {error}") from error
    growth = _growth(definition.get("normalizer")) * _growth(definition.get("pre_tokenizer"))
    growth = max(growth, _growth(definition.get("decoder")))
    if growth > _MOST_GROWTH:
        raise VocabularyError(
            f"{file} makes up to {growth} bytes of one byte of text; at most {_MOST_GROWTH} are "
            "allowed"
        )
    try:
        with _without_panics(True):
            # msgspec writes a large vocabulary in a tenth of the time that json takes.
            text = msgspec.json.encode({**definition, "post_processor": None}).decode()
            tokenizer = Tokenizer.from_str(text)
    except BaseException as error:  # tokenizers raises nothing more precise
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise VocabularyError(f"{file} is not a tokenizer: {error}") from error
    add_missing_tokens(file.parent, definition, tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Every token takes some bytes of the file, and no vocabulary has more gaps than tokens.
    last, size = max(tokenizer.get_vocab().values(), default=-1), file.stat().st_size
    if last > size:
        raise VocabularyError(f"{file} gives a token the id {last}, in a file of {size} bytes")
    return TokenizerFile(tokenizer, definition, parsed.post_processor, file, last)


def _growth(part: Any) -> int:
    """How many bytes may become of one, by the replacements of a part of a definition."""
    growth, parts = 1, [part]
    while parts:
        item = parts.pop()
        if isinstance(item, list):
            parts += item
        elif isinstance(item, dict):
            parts += item.values()
            words = (item.get("content"), item.get("prepend"), item.get("replacement"))
            for word in words:
                if isinstance(word, str):
                    growth *= max(1, len(word.encode(errors="replace")))
    return growth


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of a library in Rust.

    Args:
        error: Any exception.

    Returns:
        True for a ``PanicException`` of pyo3, which is no ``Exception``.
    """
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _without_panics(may_panic: bool) -> Iterator[None]:
    """Keep Rust from writing its own report of a panic to standard error."""
    if not may_panic:
        yield
        return
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
