"""Codes of 2, 3, 4 or 8 bits in words of 32, as the AutoGPTQ layout packs them.

A row of codes is one stream of bits, the first code in the lowest bits of the first word. Codes of
2, 4 and 8 bits never straddle two words; of 3 bits, 32 codes fill 3 words and some do.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32


def codes_per_unit(bits: int) -> int:
    """The least number of codes that fills whole words.

    Args:
        bits: Bits per code.

    Returns:
        16, 32, 8 or 4 codes for 2, 3, 4 or 8 bits; 32 of 3 bits fill 3 words, the others 1.
    """
    return WORD_BITS if WORD_BITS % bits else WORD_BITS // bits


def pack_rows(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Pack rows of codes, each filled up with zeros to whole words.

    Args:
        values: Shape (R, C), one code a byte.
        bits: Bits per code.

    Returns:
        Shape (R, words).
    """
    unit = codes_per_unit(bits)
    missing = -values.shape[1] % unit
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    if bits == 3:
        return _pack_threes(values)
    per_byte = 8 // bits
    lanes = np.ascontiguousarray(values).reshape(len(values), -1, per_byte)
    packed = np.zeros(lanes.shape[:2], dtype=np.uint8)
    for lane in range(per_byte):
        packed |= lanes[:, :, lane] << np.uint8(lane * bits)
    return packed.view("<u4").astype(np.uint32, copy=False)


def unpack_rows(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Unpack rows of words.

    Args:
        words: Shape (R, words).
        bits: Bits per code.

    Returns:
        Shape (R, C) with all codes that the words hold, one a byte.
    """
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if bits == 3:
        return _unpack_threes(packed)
    per_byte = 8 // bits
    values = np.empty((*packed.shape, per_byte), dtype=np.uint8)
    for lane in range(per_byte):
        values[:, :, lane] = packed >> np.uint8(lane * bits) & np.uint8(2**bits - 1)
    return values.reshape(len(packed), -1)


def less_one(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Take one from every code, as AutoGPTQ's first format stores zeros.

    It subtracts whole words, so that a code of 0 borrows from the one above it. Codes of 3 bits,
    some of which lie in two words, wrap each on its own, as gptqmodel stores them.

    Args:
        words: Shape (R, words).
        bits: Bits per code.

    Returns:
        Shape (R, words).
    """
    return _plus(words, bits, -1)


def plus_one(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Undo ``less_one``, exactly.

    Args:
        words: Shape (R, words).
        bits: Bits per code.

    Returns:
        Shape (R, words).
    """
    return _plus(words, bits, 1)


def _plus(words: NDArray[np.uint32], bits: int, number: Literal[-1, 1]) -> NDArray[np.uint32]:
    if bits == 3:
        return pack_rows(unpack_rows(words, bits) + np.uint8(number % 8) & np.uint8(7), bits)
    ones = (2**WORD_BITS - 1) // (2**bits - 1)  # a 1 in every lane, 0x11111111 for 4 bits
    return words + np.uint32(number * ones % 2**WORD_BITS)


def _pack_threes(values: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Pack (R, C) codes of 3 bits, 8 of them to 3 bytes."""
    eights = values.reshape(len(values), -1, 8)
    stream = np.zeros(eights.shape[:2], dtype=np.uint32)
    for lane in range(8):
        stream |= eights[:, :, lane].astype(np.uint32) << np.uint32(3 * lane)
    packed = np.empty((*stream.shape, 3), dtype=np.uint8)
    for byte in range(3):
        packed[:, :, byte] = stream >> np.uint32(8 * byte) & np.uint32(255)
    return packed.reshape(len(values), -1).view("<u4").astype(np.uint32, copy=False)


def _unpack_threes(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Unpack bytes (R, C * 3 / 8) into codes (R, C) of 3 bits."""
    threes = packed.reshape(len(packed), -1, 3).astype(np.uint32)
    stream = threes[:, :, 0] | threes[:, :, 1] << np.uint32(8) | threes[:, :, 2] << np.uint32(16)
    values = np.empty((*stream.shape, 8), dtype=np.uint8)
    for lane in range(8):
        values[:, :, lane] = stream >> np.uint32(3 * lane) & np.uint32(7)
    return values.reshape(len(packed), -1)
