"""Weights in blocks, decoded one number at a time from the documented layout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.weights.blocks import BlockWeight


def decode(weight: BlockWeight) -> NDArray[np.float32]:
    """(N, K) weights: scale * (code - zero), columns put back where the order says they are from.

    Reads the packed bytes of codes and zero points as onnxruntime's documentation of MatMulNBits
    describes them: the first of two 4-bit numbers is in the low half of a byte.
    """
    rows = len(weight.codes)
    packed_zeros = weight.packed_zeros()
    decoded = np.zeros((rows, weight.columns), np.float32)
    for row in range(rows):
        for place in range(weight.columns):
            block, column = divmod(place, weight.block_size)
            code = _number(weight.codes[row, block], column, weight.bits)
            zero = (
                2 ** (weight.bits - 1)
                if packed_zeros is None
                else _number(packed_zeros[row], block, weight.bits)
            )
            target = place if weight.order is None else weight.order[place]
            decoded[row, target] = weight.scales[row, block] * np.float32(code - zero)
    return decoded


def _number(packed: NDArray[np.uint8], index: int, bits: int) -> int:
    if bits == 8:
        return int(packed[index])
    byte = int(packed[index // 2])
    return byte % 16 if index % 2 == 0 else byte // 16
