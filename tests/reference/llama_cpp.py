"""What llama.cpp does, written down slowly (its order of rows, its words), or asked of it."""

from __future__ import annotations

import subprocess
from pathlib import Path
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


def log_probabilities(
    program: Path, file: Path, text: str, folder: Path, positions: int
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """What llama.cpp itself makes of a text: its tokens, and the logarithms of its predictions.

    ``llama-perplexity`` cuts the text into chunks of so many positions and writes down the second
    half of each chunk but the last position, in 65,535 steps from the most probable token down to
    16 nats below.

    Returns:
        Tokens (chunks, positions), and (chunks, positions - 1 - positions // 2, V).
    """
    written, read = folder / "logits.bin", folder / "text.txt"
    read.write_text(text, "utf-8")
    command = [str(program), "-m", str(file), "-f", str(read), "-c", str(positions), "-t", "1"]
    command += ["-b", str(positions), "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    command += ["--save-all-logits", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    content = written.read_bytes()
    assert content[:8] == b"_logits_"
    length, size, chunks = np.frombuffer(content, np.int32, 3, 8)
    tokens = np.frombuffer(content, np.int32, chunks * length, 20).reshape(chunks, length)
    kept = length - 1 - length // 2
    width = 2 * ((size + 1) // 2) + 4
    rows = np.frombuffer(content, np.uint16, chunks * kept * width, 20 + tokens.nbytes)
    rows = rows.reshape(chunks, kept, width)
    scale, lowest = np.moveaxis(rows[..., :4].copy().view(np.float32).astype(np.float64), -1, 0)
    return tokens, rows[..., 4 : 4 + size] * scale[..., None] + lowest[..., None]
