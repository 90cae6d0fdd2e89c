"""Targets as bytes: what a teacher said at some positions, in a few dozen bytes each.

Of a draw of N tokens, sorted by id, the plain code keeps one bit per draw that says whether it
opens a new token, the ids of the K different tokens in as many bits as the vocabulary needs, and
the entropy in two bytes. The coded form holds the same numbers: the gaps between ids as a length
and the bits below the leading one, and the lengths, the counts and the coarse half of the entropy
in Huffman codes, which zlib makes and reads. The most probable tokens are kept with their
probabilities as 16-bit floats.

All is written and read for many positions at once. n is positions, N draws, K different tokens of
a position, M those of all positions together, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.settings import TargetSettings

_ENTROPY_STEPS = 2**16 - 1


@dataclass(frozen=True)
class StoredTargets:
    """What is kept of a teacher's answers at n positions, one after the other.

    Attributes:
        sizes: Different tokens at each position, K, int64, shape (n,).
        ids: Those tokens, int64, shape (M,).
        values: Their counts among the draws (int64), or their probabilities (float32), shape (M,).
        entropy: In nats, float32, shape (n,); 0 where probabilities are kept.
    """

    sizes: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[Any]
    entropy: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.sizes)

    def split(self, positions: Sequence[int] | NDArray[np.int64]) -> list[StoredTargets]:
        """Cut into pieces.

        Args:
            positions: Positions of each piece, in order; all of them together.

        Returns:
            A view for each piece.
        """
        rows = np.cumsum(positions)[:-1]
        tokens = np.concatenate([[0], np.cumsum(self.sizes)])[rows]
        parts = (
            np.split(self.sizes, rows),
            np.split(self.ids, tokens),
            np.split(self.values, tokens),
            np.split(self.entropy, rows),
        )
        return [StoredTargets(*part) for part in zip(*parts, strict=True)]

    def padded(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """As rectangles.

        Returns:
            Ids and values, shape (n, K) with the largest K of all; 0 in slots that are not used.
        """
        width = int(self.sizes.max(initial=1))
        is_used = np.arange(width) < self.sizes[:, None]
        ids = np.zeros(is_used.shape, np.int64)
        values = np.zeros(is_used.shape, np.float32)
        ids[is_used], values[is_used] = self.ids, self.values
        return ids, values


def join(parts: Sequence[StoredTargets]) -> StoredTargets:
    """Put pieces behind one another.

    Args:
        parts: At least one.

    Returns:
        All of their positions in order.
    """
    return StoredTargets(
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.entropy for part in parts]),
    )


def count_draws(draws: NDArray[np.int64], entropy: NDArray[np.float32]) -> StoredTargets:
    """Count how often each token was drawn.

    Args:
        draws: Token ids, shape (n, N), each row in rising order.
        entropy: Of the distributions drawn from, shape (n,).

    Returns:
        What is to be kept of them.
    """
    opens = np.ones(draws.shape, bool)
    opens[:, 1:] = draws[:, 1:] != draws[:, :-1]
    return StoredTargets(opens.sum(axis=1), draws[opens], _run_lengths(opens), entropy)


class Codec(Protocol):
    """A way to write targets as bytes."""

    def encode(self, targets: StoredTargets) -> bytes:
        """Write targets.

        Args:
            targets: Of n positions.

        Returns:
            Bytes that know neither n nor where they end.
        """

    def decode(self, data: bytes, positions: int) -> StoredTargets:
        """Read targets.

        Args:
            data: What ``encode`` wrote.
            positions: How many there are, n.

        Returns:
            The targets, entropies rounded to what two bytes tell.
        """


def codec_of(settings: TargetSettings, vocabulary_size: int) -> Codec:
    """The codec that the settings ask for.

    Args:
        settings: Method, draws and codec.
        vocabulary_size: V.

    Returns:
        A codec.
    """
    if settings.method == "top_k":
        return TopKCode(vocabulary_size, min(settings.top_k, vocabulary_size))
    kind = CodedDraws if settings.codec == "coded" else PlainDraws
    return kind(vocabulary_size, settings.draws)


@dataclass(frozen=True)
class PlainDraws:
    """A bit per draw, the ids in as few bits as the vocabulary needs, two bytes of entropy.

    Attributes:
        vocabulary_size: V.
        draws: N.
    """

    vocabulary_size: int
    draws: int

    def encode(self, targets: StoredTargets) -> bytes:
        """Write targets: see ``Codec``."""
        opens = np.zeros(len(targets) * self.draws, np.uint8)
        opens[np.cumsum(targets.values) - targets.values] = 1
        widths = np.full(len(targets.ids), id_bits(self.vocabulary_size))
        return b"".join(
            (
                np.packbits(opens, bitorder="little").tobytes(),
                write_bits(targets.ids, widths),
                pack_entropy(targets.entropy, self.vocabulary_size).astype("<u2").tobytes(),
            )
        )

    def decode(self, data: bytes, positions: int) -> StoredTargets:
        """Read targets: see ``Codec``."""
        code = np.frombuffer(data, np.uint8)
        bits = positions * self.draws
        opened = np.unpackbits(code, count=bits, bitorder="little")
        opens = opened.astype(bool).reshape(positions, self.draws)
        sizes = opens.sum(axis=1)
        widths = np.full(sizes.sum(), id_bits(self.vocabulary_size))
        return StoredTargets(
            sizes,
            read_bits(code[-(-bits // 8) :], widths),
            _run_lengths(opens),
            unpack_entropy(
                np.frombuffer(data[len(data) - 2 * positions :], "<u2"), self.vocabulary_size
            ),
        )


@dataclass(frozen=True)
class CodedDraws:
    """The same numbers in fewer bytes.

    Ids of frequent tokens are small in most vocabularies, and a row of K tokens is a set, whose
    order is worth log2 K! bits: gaps between sorted ids use both. The length of a gap in bits is
    far from random and is Huffman coded; what is below its leading bit is kept as it is.

    Attributes:
        vocabulary_size: V.
        draws: N.
    """

    vocabulary_size: int
    draws: int

    def encode(self, targets: StoredTargets) -> bytes:
        """Write targets: see ``Codec``."""
        gaps = targets.ids.copy()
        gaps[1:] -= targets.ids[:-1] + 1
        first = np.cumsum(targets.sizes) - targets.sizes
        gaps[first] = targets.ids[first]
        lengths = _bit_lengths(gaps)
        # The last count of a position follows from the others.
        is_stored = np.ones(len(gaps), bool)
        is_stored[first + targets.sizes - 1] = False
        entropy = pack_entropy(targets.entropy, self.vocabulary_size)
        huffman = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        parts = []
        for symbols in (targets.sizes, lengths, targets.values[is_stored], entropy >> 8):
            # A code of its own for every kind of symbol.
            parts.append(huffman.compress(symbols.astype(np.uint8).tobytes()))
            parts.append(huffman.flush(zlib.Z_BLOCK))
        parts.append(huffman.flush())
        widths = np.maximum(lengths - 1, 0)
        parts.append((entropy & 0xFF).astype(np.uint8).tobytes())
        parts.append(write_bits(gaps, widths))
        return b"".join(parts)

    def decode(self, data: bytes, positions: int) -> StoredTargets:
        """Read targets: see ``Codec``."""
        huffman = zlib.decompressobj(-15)
        symbols = np.frombuffer(huffman.decompress(data), np.uint8).astype(np.int64)
        rest = np.frombuffer(huffman.unused_data, np.uint8)
        sizes = symbols[:positions]
        stored = int(sizes.sum())
        lengths, stored_counts, coarse = np.split(
            symbols[positions:], [stored, 2 * stored - positions]
        )
        gaps = read_bits(rest[positions:], np.maximum(lengths - 1, 0))
        gaps += (1 << lengths) >> 1

        last = np.cumsum(sizes) - 1
        first = last + 1 - sizes
        counts = np.zeros(stored, np.int64)
        is_stored = np.ones(stored, bool)
        is_stored[last] = False
        counts[is_stored] = stored_counts
        counts[last] = self.draws - np.add.reduceat(counts, first)
        # Ids are sums of gaps since the first of their position.
        ids = np.cumsum(gaps + 1)
        ids -= np.repeat(ids[first] - gaps[first], sizes)
        entropy = unpack_entropy((coarse << 8) | rest[:positions], self.vocabulary_size)
        return StoredTargets(sizes, ids, counts, entropy)


@dataclass(frozen=True)
class TopKCode:
    """The ids in as few bits as the vocabulary needs, and two bytes for each probability.

    Attributes:
        vocabulary_size: V.
        top_k: K.
    """

    vocabulary_size: int
    top_k: int

    def encode(self, targets: StoredTargets) -> bytes:
        """Write targets: see ``Codec``."""
        widths = np.full(len(targets.ids), id_bits(self.vocabulary_size))
        return targets.values.astype("<f2").tobytes() + write_bits(targets.ids, widths)

    def decode(self, data: bytes, positions: int) -> StoredTargets:
        """Read targets: see ``Codec``."""
        stored = positions * self.top_k
        widths = np.full(stored, id_bits(self.vocabulary_size))
        return StoredTargets(
            np.full(positions, self.top_k),
            read_bits(np.frombuffer(data, np.uint8)[2 * stored :], widths),
            np.frombuffer(data[: 2 * stored], "<f2").astype(np.float32),
            np.zeros(positions, np.float32),
        )


# --- numbers and bits ---------------------------------------------------------------------------


def id_bits(vocabulary_size: int) -> int:
    """Bits that tell any token from any other.

    Args:
        vocabulary_size: V.

    Returns:
        15 for 32,000 tokens.
    """
    return max(1, (vocabulary_size - 1).bit_length())


def pack_entropy(entropy: NDArray[np.float32], vocabulary_size: int) -> NDArray[np.int64]:
    """Entropies as whole numbers of 16 bits.

    The square root is divided evenly between 0 and that of ln V: steps are finest near 0, and
    an entropy is off by ln V / 65,535 at most, 0.0002 nats.

    Args:
        entropy: In nats, shape (n,).
        vocabulary_size: V.

    Returns:
        0 to 65,535, shape (n,).
    """
    share = np.clip(entropy.astype(np.float64) / _highest(vocabulary_size), 0, 1)
    steps: NDArray[np.int64] = np.rint(np.sqrt(share) * _ENTROPY_STEPS).astype(np.int64)
    return steps


def unpack_entropy(packed: NDArray[np.integer], vocabulary_size: int) -> NDArray[np.float32]:
    """Whole numbers of 16 bits as entropies.

    Args:
        packed: 0 to 65,535, shape (n,).
        vocabulary_size: V.

    Returns:
        In nats, shape (n,).
    """
    root = packed.astype(np.float64) / _ENTROPY_STEPS
    return (root * root * _highest(vocabulary_size)).astype(np.float32)


def _highest(vocabulary_size: int) -> float:
    return math.log(max(2, vocabulary_size))


def write_bits(values: NDArray[np.int64], widths: NDArray[np.int64]) -> bytes:
    """Put the lowest bits of numbers behind one another, lowest first.

    Args:
        values: Whole numbers from 0, shape (M,).
        widths: How many bits of each, 0 to 24, shape (M,).

    Returns:
        Bytes, of which the last is filled up with zeros.
    """
    starts = np.cumsum(widths) - widths
    owners = np.repeat(np.arange(len(values)), widths)
    places = np.arange(len(owners)) - starts[owners]
    bits = ((values[owners] >> places) & 1).astype(np.uint8)
    return np.packbits(bits, bitorder="little").tobytes()


def read_bits(code: NDArray[np.uint8], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Read what ``write_bits`` wrote.

    Args:
        code: Its bytes; more may follow.
        widths: Bits of each number, 0 to 24, shape (M,).

    Returns:
        The numbers, shape (M,).
    """
    ends = np.cumsum(widths)
    starts = ends - widths
    # Any 24 bits lie within 4 bytes.
    needed = -(-int(widths.sum()) // 8)
    padded = np.zeros(needed + 4, np.uint32)
    padded[:needed] = code[:needed]
    words = padded[:-3] | padded[1:-2] << 8 | padded[2:-1] << 16 | padded[3:] << 24
    numbers: NDArray[np.int64] = words[starts >> 3].astype(np.int64) >> (starts & 7)
    return numbers & ((1 << widths) - 1)


def _bit_lengths(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bits of whole numbers from 0: 0, 1, 2, 2, 3, ..."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _run_lengths(opens: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Draws from each one that opens a new token to the next; each row opens with one."""
    starts = np.flatnonzero(opens)
    return np.diff(starts, append=opens.size)
