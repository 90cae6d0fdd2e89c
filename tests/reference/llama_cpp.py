"""What llama.cpp does, written down slowly: its order of rows, and how it cuts text into words."""

from __future__ import annotations

from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

# src/llama-vocab.cpp: every expression cuts what the one before it left.
EXPRESSIONS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
        r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


def words(text: str, kind: str) -> list[str]:
    """Cut a text as llama.cpp does: the matches, and whatever lies between two of them."""
    pieces = [text]
    for expression in EXPRESSIONS[kind]:
        pieces = [part for piece in pieces for part in _cut(piece, expression)]
    return pieces


def _cut(text: str, expression: str) -> list[str]:
    found = []
    place = 0
    for match in regex.finditer(expression, text):
        found += [text[place : match.start()], match.group()]
        place = match.end()
    return [piece for piece in [*found, text[place:]] if piece]


def interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows in llama.cpp's order: what transformers rotates as a pair stands side by side."""
    size = len(weight) // heads
    rows = []
    for head in range(heads):
        for pair in range(size // 2):
            rows += [weight[head * size + pair], weight[head * size + size // 2 + pair]]
    return np.stack(rows)
