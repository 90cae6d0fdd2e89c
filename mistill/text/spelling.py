"""The text of single tokens, as byte-level and SentencePiece vocabularies spell it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mistill.errors import VocabularyError

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class _ByteLevelSpeller:
    """Tokens written in the 256 printable stand-ins of GPT-2 for the 256 bytes."""

    def __init__(self) -> None:
        self._byte_of = {character: byte for byte, character in byte_characters().items()}

    def __call__(self, token: str) -> bytes:
        byte_of = self._byte_of
        return b"".join(
            bytes([byte_of[letter]]) if letter in byte_of else letter.encode() for letter in token
        )


class _SentencePieceSpeller:
    """Tokens written in UTF-8, with a mark for the space and ``<0x41>`` for a lone byte."""

    def __init__(self, space: str) -> None:
        self._space = space

    def __call__(self, token: str) -> bytes:
        if _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(self._space, " ").encode()


def byte_characters() -> dict[int, str]:
    """The printable characters that stand for bytes in a byte-level vocabulary.

    Bytes that print keep their Latin-1 character; the others take those from U+0100 on, in
    order (Radford et al., 2019).

    Returns:
        Byte to character.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {
        byte: chr(0x100 + index) for index, byte in enumerate(others)
    }


def speller_of(definition: Mapping[str, Any]) -> _ByteLevelSpeller | _SentencePieceSpeller:
    """How the vocabulary of a tokenizer.json spells its tokens."""
    decoder = definition.get("decoder") or {}
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    decoders = {part.get("type"): part for part in parts}
    if "ByteLevel" in decoders:
        return _ByteLevelSpeller()
    if "Metaspace" in decoders:
        return _SentencePieceSpeller(decoders["Metaspace"].get("replacement", "\u2581"))
    replace = decoders.get("Replace", {})
    if replace.get("content") == " " and "String" in replace.get("pattern", {}):
        return _SentencePieceSpeller(replace["pattern"]["String"])
    raise VocabularyError(
        "mistill reads byte-level BPE and SentencePiece vocabularies; this tokenizer decodes "
        f"with {' and '.join(sorted(map(str, decoders)))}"
    )
