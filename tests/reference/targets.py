"""Targets on disk, written out slowly: one position, one token, one bit at a time."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from mistill.text.blocks import TokenBlocks


class Position(NamedTuple):
    """What is kept of one distribution: how often each token was drawn, and the entropy."""

    counts: dict[int, int]
    entropy: float


def walk(probabilities: list[float], heights: list[float]) -> list[int]:
    """The token at each height of the cumulative distribution, in exact arithmetic."""
    p = [Fraction(value) for value in probabilities]
    total = sum(p)
    found = []
    for height in heights:
        left = Fraction(height) * total
        token = 0
        while left >= p[token]:
            left -= p[token]
            token += 1
        found.append(token)
    return found


def systematic_counts(probabilities: list[float], u: float, draws: int) -> Counter[int]:
    """How often each token is met at the heights (u + i) / N, in exact arithmetic."""
    heights = [(Fraction(u) + i) / draws for i in range(draws)]
    return Counter(walk(probabilities, heights))  # type: ignore[arg-type]


def plain_code(positions: list[Position], vocabulary_size: int) -> bytes:
    """Bitmap of draws, then ids, then entropies, by strings of 0 and 1."""
    width = len(f"{vocabulary_size - 1:b}")
    opens = ids = ""
    entropies = b""
    for position in positions:
        for token in sorted(position.counts):
            opens += "1" + "0" * (position.counts[token] - 1)
            ids += f"{token:0{width}b}"[::-1]
        entropies += entropy_code(position.entropy, vocabulary_size).to_bytes(2, "little")
    return _bytes(opens) + _bytes(ids) + entropies


def entropy_code(entropy: float, vocabulary_size: int) -> int:
    """The square root of the entropy's share of the highest, in 65,535 steps."""
    return round(65535 * math.sqrt(min(entropy / math.log(vocabulary_size), 1)))


def read_coded(code: bytes, positions: int, vocabulary_size: int, draws: int) -> list[Position]:
    """The coded form, symbol by symbol and bit by bit."""
    huffman = zlib.decompressobj(-15)
    symbols = list(huffman.decompress(code))
    rest = huffman.unused_data
    bits = "".join(f"{byte:08b}"[::-1] for byte in rest[positions:])
    sizes = symbols[:positions]
    lengths = iter(symbols[positions : positions + sum(sizes)])
    counts = iter(symbols[positions + sum(sizes) : 2 * sum(sizes)])
    coarse = symbols[2 * sum(sizes) :]
    found = []
    for number, size in enumerate(sizes):
        token, left = -1, draws
        told: dict[int, int] = {}
        for place in range(size):
            length = next(lengths)
            gap = 0
            if length:
                below, bits = bits[: length - 1], bits[length - 1 :]
                gap = int("1" + below[::-1], 2)
            token += gap + 1
            told[token] = left if place == size - 1 else next(counts)
            left -= told[token]
        steps = coarse[number] * 256 + rest[number]
        found.append(Position(told, (steps / 65535) ** 2 * math.log(vocabulary_size)))
    return found


def pieces(blocks: TokenBlocks) -> list[tuple[int, int, int, int]]:
    """Row, first column, column after the last and kept positions of every run with any."""
    kept = blocks.kept
    found = []
    for row in range(len(blocks)):
        start = 0
        for column in range(1, blocks.block_length + 1):
            over = column == blocks.block_length
            if over or blocks.documents[row, column] != blocks.documents[row, start]:
                positions = sum(bool(kept[row, place]) for place in range(start, column))
                if positions:
                    found.append((row, start, column, positions))
                start = column
    return found


def padded(positions: list[Position]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and counts of each position, in rising order of tokens."""
    tokens = [sorted(position.counts) for position in positions]
    counts = [[p.counts[token] for token in row] for p, row in zip(positions, tokens, strict=True)]
    return tokens, counts


def zipf(vocabulary_size: int, seed: int, power: float = 1.3) -> np.ndarray:
    """A distribution in which small ids are more probable, as in real vocabularies."""
    noise = np.random.default_rng(seed).gumbel(size=vocabulary_size)
    logits = -power * np.log(np.arange(1, vocabulary_size + 1)) + 1.5 * noise
    p: np.ndarray = np.exp(logits - logits.max())
    p /= p.sum()
    return p


def _bytes(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[place : place + 8][::-1], 2) for place in range(0, len(bits), 8))
