"""Weights as ONNX Runtime multiplies them: codes in blocks of columns that share a scale.

``MatMulNBits`` and ``GatherBlockQuantized`` read the same bytes: for each of N rows, blocks of
16 to 256 columns, two 4-bit codes to a byte with the even column in the low half, four of 2 bits
likewise. A weight is
scale * (code - zero); without zeros, zero is the middle of the code range.

Codes of a GPTQ checkpoint go over as they are. A group longer than a block is split into blocks
with the same scale; columns that mix groups (act-order) are sorted by group, and the order is
kept for the graph to gather its activations by. Neither changes a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.settings import LEGAL_BLOCKS
from mistill.errors import ExportError
from mistill.weights.gptq_layout import QuantizedWeight

# With this many steps up to the largest level, the 16 levels of NF4 are closest to whole steps.
NF4_STEPS = 124.11
_ROWS_AT_ONCE = 4096

# Normal numbers of float16; smaller ones have fewer digits.
_LEAST_HALF, _MOST_HALF = 2.0**-14, 65504.0


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """A weight matrix of N rows and K columns, in blocks.

    Attributes:
        codes: Packed codes, shape (N, blocks, block_size * bits / 8); columns beyond K hold the
            zero point.
        scales: Shape (N, blocks).
        zeros: Shape (N, blocks), one zero point to a byte, or None for the middle of the range.
        bits: Bits per code, 2, 4 or 8.
        columns: Number of columns, K.
        order: Shape (K,), the input column that stands at each place, or None if they are in
            order.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None
    bits: int
    columns: int
    order: NDArray[np.int64] | None = None

    @property
    def block_size(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[2]) * 8 // self.bits

    @property
    def rows(self) -> int:
        """N."""
        return len(self.codes)

    def packed_zeros(self) -> NDArray[np.uint8] | None:
        """Zero points as the operators read them, each row filled up to a whole byte."""
        return None if self.zeros is None else _pack(self.zeros, self.bits)

    def steps(self) -> tuple[NDArray[np.int8] | NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Codes with a byte for each, as other runtimes read them.

        Returns:
            Signed codes (N, K) about 0 and None where the zero is the middle of the range; codes
            as they are and zeros (N, blocks) elsewhere. Columns stand in the order of the blocks.
        """
        codes = _unpack(self.codes, self.bits).reshape(self.rows, -1)[:, : self.columns]
        if self.zeros is not None:
            return codes, self.zeros
        return (codes.astype(np.int16) - (1 << (self.bits - 1))).astype(np.int8), None

    def dequantize(self) -> NDArray[np.float32]:
        """The weight that the codes stand for, its columns in their original order.

        Returns:
            Shape (N, K).
        """
        middle = 1 << (self.bits - 1)
        weight = np.empty((self.rows, self.columns), np.float32)
        for start in range(0, self.rows, _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            steps = _unpack(self.codes[part], self.bits).astype(np.float32)
            steps -= middle if self.zeros is None else self.zeros[part, :, None]
            steps *= self.scales[part, :, None]
            weight[part] = steps.reshape(len(steps), -1)[:, : self.columns]
        if self.order is None:
            return weight
        original = np.empty_like(weight)
        original[:, self.order] = weight
        return original

    def dequantize_columns(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some columns of the weight that the codes stand for.

        Args:
            columns: Which, as the input counts them.

        Returns:
            Shape (N, columns).
        """
        places = columns if self.order is None else np.argsort(self.order)[columns]
        blocks, lanes = places // self.block_size, 8 // self.bits
        within = places % self.block_size
        shifts = (within % lanes * self.bits).astype(np.uint8)
        codes = self.codes[:, blocks, within // lanes] >> shifts & np.uint8(2**self.bits - 1)
        middle = np.float32(1 << (self.bits - 1))
        zeros = middle if self.zeros is None else self.zeros[:, blocks].astype(np.float32)
        return np.asarray((codes.astype(np.float32) - zeros) * self.scales[:, blocks])

    def take_rows(self, order: NDArray[np.int64]) -> BlockWeight:
        """The same rows in another order, which is exact: no scale spans two rows.

        Args:
            order: Shape (N,), the row that goes to each place.

        Returns:
            The reordered weight.
        """
        return replace(
            self,
            codes=self.codes[order],
            scales=self.scales[order],
            zeros=None if self.zeros is None else self.zeros[order],
        )

    def split(self, block_size: int) -> BlockWeight:
        """The same weight in smaller blocks, scales repeated.

        Args:
            block_size: Columns per block; divides the present one.

        Returns:
            The weight in smaller blocks.
        """
        times = self.block_size // block_size
        if times == 1:
            return self
        return replace(
            self,
            codes=self.codes.reshape(self.rows, -1, block_size * self.bits // 8),
            scales=self.scales.repeat(times, axis=1),
            zeros=None if self.zeros is None else self.zeros.repeat(times, axis=1),
        )


def can_stack(weights: Sequence[BlockWeight]) -> bool:
    """Whether matrices can be multiplied as one: same bits, columns and order of columns.

    Args:
        weights: Matrices that read the same input.

    Returns:
        True if ``stack`` accepts them.
    """
    first = weights[0]
    return all(
        weight.bits == first.bits
        and weight.columns == first.columns
        and _same_order(weight.order, first.order)
        for weight in weights
    )


def stack(weights: Sequence[BlockWeight]) -> BlockWeight:
    """Put the rows of several matrices below one another.

    Args:
        weights: Matrices for which ``can_stack`` holds.

    Returns:
        One matrix, in the smallest of their blocks.
    """
    first = weights[0]
    block_size = min(weight.block_size for weight in weights)
    parts = [weight.split(block_size) for weight in weights]
    # Columns are padded to whole blocks; a split weight may need more padding.
    blocks = -(-first.columns // block_size)
    zeros = None
    if any(part.zeros is not None for part in parts):
        middle = np.uint8(1 << (first.bits - 1))
        zeros = np.concatenate(
            [
                np.full(part.scales.shape, middle) if part.zeros is None else part.zeros
                for part in parts
            ]
        )[:, :blocks]
    return BlockWeight(
        codes=np.concatenate([part.codes[:, :blocks] for part in parts]),
        scales=np.concatenate([part.scales[:, :blocks] for part in parts]),
        zeros=zeros,
        bits=first.bits,
        columns=first.columns,
        order=first.order,
    )


def blocks_of_codes(weight: QuantizedWeight, largest_block: int) -> BlockWeight:
    """Take over the codes of a GPTQ checkpoint, unchanged.

    Args:
        weight: The weight as the checkpoint holds it.
        largest_block: Most columns per block.

    Returns:
        The same codes in blocks.

    Raises:
        ExportError: If the groups cannot be cut into blocks of at least 16 columns.
    """
    order = None
    codes, groups = weight.codes, weight.g_idx
    if bool((np.diff(groups) < 0).any()):
        order = np.argsort(groups, kind="stable")
        codes, groups = codes[:, order], groups[order]
    bounds = np.flatnonzero(np.diff(groups)) + 1
    block_size = _block_for(codes.shape[1], bounds.tolist(), largest_block)
    if block_size is None:
        raise ExportError(
            f"groups of {weight.group_size} columns cannot be split into blocks of "
            f"{', '.join(map(str, LEGAL_BLOCKS))} columns, as ONNX Runtime needs; quantize again "
            "with a group size of 16, 32, 64 or 128"
        )
    group_of_block = groups[::block_size]
    zeros = weight.zeros[:, group_of_block]
    padding = -codes.shape[1] % block_size
    if padding:
        codes = np.concatenate([codes, zeros[:, -1:].repeat(padding, axis=1)], axis=1)
    return BlockWeight(
        codes=_pack(codes.reshape(len(codes), -1, block_size), weight.bits),
        scales=weight.scales[:, group_of_block].astype(np.float32),
        zeros=None if weight.symmetric else zeros,
        bits=weight.bits,
        columns=weight.codes.shape[1],
        order=order,
    )


def widen(weight: QuantizedWeight) -> QuantizedWeight:
    """Store codes of a few bits in 8, which changes no weight: steps from the zero stay the same.

    Args:
        weight: Codes of fewer than 8 bits.

    Returns:
        The same weight; its zeros are in the middle of the range if they were.
    """
    shift = np.uint8(128 - (1 << (weight.bits - 1)))
    return replace(weight, codes=weight.codes + shift, zeros=weight.zeros + shift, bits=8)


def blocks_of_nf4(
    codes: NDArray[np.uint8],
    levels: NDArray[np.float32],
    block_maxima: NDArray[np.float32],
    shape: tuple[int, int],
    nf4_block: int,
    largest_block: int,
) -> BlockWeight:
    """Put NF4 on an 8-bit grid: its 16 levels become 16 of the 256 codes.

    NF4 (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314) has no fast CPU kernel; 8-bit
    integers have. The levels move by up to half a step of 1 / 124.11, far less than NF4's own
    rounding.

    Args:
        codes: Shape (N * K / 2,), two 4-bit codes to a byte with the first in the high half.
        levels: Shape (16,), from -1 to 1.
        block_maxima: The largest magnitude in each run of ``nf4_block`` weights.
        shape: Shape of the matrix, (N, K).
        nf4_block: Weights that share a scale, 64 as bitsandbytes writes it nearly everywhere.
        largest_block: Most columns per block.

    Returns:
        The weight in 8-bit blocks.

    Raises:
        ExportError: If a run of weights reaches into the next row, or cannot be cut into blocks.
    """
    rows, columns = shape
    if columns % nf4_block:
        raise ExportError(
            f"NF4 weights with {columns} columns have blocks of {nf4_block} that reach into the "
            "next row, which bitsandbytes itself misreads on a CPU; quantize the float model by "
            "GPTQ instead"
        )
    fitting = [block for block in LEGAL_BLOCKS if nf4_block % block == 0 and block <= largest_block]
    if not fitting:
        raise ExportError(
            f"NF4 weights in blocks of {nf4_block} cannot be split into blocks of "
            f"{', '.join(map(str, LEGAL_BLOCKS))} columns, as ONNX Runtime needs"
        )
    block_size = max(fitting)
    grid = (np.rint(levels * NF4_STEPS) + 128).astype(np.uint8)
    both = np.stack([codes >> 4, codes & 15], axis=-1)
    scales = block_maxima.repeat(nf4_block // block_size)
    return BlockWeight(
        codes=grid[both].reshape(rows, -1, block_size),
        scales=(scales / np.float32(NF4_STEPS)).reshape(rows, -1),
        zeros=None,
        bits=8,
        columns=columns,
    )


def round_to_blocks(weight: NDArray[np.floating], bits: int, largest_block: int) -> BlockWeight:
    """Round a float matrix to the nearest codes, symmetrically about the middle of the range.

    Args:
        weight: Shape (N, K).
        bits: Bits per code, 4 or 8.
        largest_block: Most columns per block.

    Returns:
        The rounded matrix.
    """
    rows, columns = weight.shape
    block_size = _block_for(columns, [], largest_block)
    assert block_size is not None  # without bounds, any legal block fits
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = weight[start : start + _ROWS_AT_ONCE].astype(np.float32, copy=False)
        part = np.pad(part, ((0, 0), (0, blocks * block_size - columns)))
        whole, scale = _round(part.reshape(len(part), blocks, block_size), bits)
        codes[start : start + len(part)] = _pack(whole, bits)
        scales[start : start + len(part)] = scale
    return BlockWeight(codes, scales, None, bits, columns)


def _round(blocks: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes (N, blocks, block_size) and scales (N, blocks).

    The range has one more code below its middle than above it. At 8 bits that does not matter;
    at 4 bits the weight of largest magnitude is put on the extra code, whichever its sign. Scales
    are float16 numbers, which take half the bytes in the file, where float16 has them all with its
    full precision.
    """
    middle = 1 << (bits - 1)
    if bits == 8:
        scales = np.abs(blocks).max(axis=-1) / np.float32(middle - 1)
    else:
        low, high = blocks.min(axis=-1), blocks.max(axis=-1)
        scales = np.where(-low > high, -low, -high) / np.float32(middle)
    sizes = np.abs(scales[scales != 0])
    if bool((sizes >= _LEAST_HALF).all() and (sizes <= _MOST_HALF).all()):
        scales = scales.astype(np.float16)
    scales = scales.astype(np.float32)
    safe = np.where(scales == 0, np.float32(1), scales)
    steps = np.rint(blocks / safe[..., None])
    codes = np.clip(steps + middle, 0, 2 * middle - 1).astype(np.uint8)
    return codes, scales


def _block_for(columns: int, bounds: Sequence[int], largest_block: int) -> int | None:
    """The largest legal block at which every group bound lies between two blocks.

    The least padding goes before the larger block, since padding costs bytes and time.
    """
    fitting = [
        block
        for block in LEGAL_BLOCKS
        if block <= largest_block and all(bound % block == 0 for bound in bounds)
    ]
    return min(fitting, key=lambda block: (-columns % block, -block), default=None)


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes of one byte each along the last axis, the first in the lowest bits."""
    if bits == 8:
        return np.ascontiguousarray(values)
    lanes = 8 // bits
    missing = -values.shape[-1] % lanes
    if missing:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    packed = np.zeros((*values.shape[:-1], values.shape[-1] // lanes), np.uint8)
    for lane in range(lanes):
        packed |= values[..., lane::lanes] << np.uint8(lane * bits)
    return packed


def _unpack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return values
    lanes = [values >> np.uint8(lane * bits) & np.uint8(2**bits - 1) for lane in range(8 // bits)]
    return np.stack(lanes, axis=-1).reshape(*values.shape[:-1], -1)


def _same_order(left: NDArray[np.int64] | None, right: NDArray[np.int64] | None) -> bool:
    if left is None or right is None:
        return left is right
    return bool(np.array_equal(left, right))
