"""The layout of 4-bit NormalFloat weights as bitsandbytes saves them, and what they stand for.

The weights of a linear layer are taken row by row as one run, and every 64 of them, or as many as
the state of the weight says, share a scale, their largest magnitude. A weight divided by it is one
of 16 levels (QLoRA, Dettmers et al., 2023, section 3, https://arxiv.org/abs/2305.14314). With n
weights in B blocks the tensors are

    weight                                   uint8 (n / 2, 1), the first code in the high bits, or
                                             the same bytes seen as wider numbers
    weight.absmax                            float32 (B,), or uint8 (B,) if quantized themselves
    weight.quant_map                         float32 (16,), the levels
    weight.nested_absmax                     float32, a scale for every 256 of the absmax
    weight.nested_quant_map                  float32 (256,), the levels of the absmax
    weight.quant_state.bitsandbytes__nf4     JSON: shape, type, block sizes, mean of the absmax

Needs numpy alone, so that a laptop without PyTorch or bitsandbytes can read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct, ValidationError, convert
from numpy.typing import NDArray

from mistill.errors import FolderError
from mistill.folders.json_text import parse_json

NF4_STATE = "quant_state.bitsandbytes__nf4"

# Of a linear layer, in which ``read_nf4`` finds what it needs.
NF4_NAMES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    f"weight.{NF4_STATE}",
)


_Count = Annotated[int, Meta(ge=1)]


class Nf4State(Struct, frozen=True, kw_only=True):
    """What is stored about a weight beside its tensors.

    Attributes:
        shape: Outputs and inputs (N, K).
        blocksize: Weights that share a scale.
        quant_type: The levels; ``nf4``.
        nested_blocksize: Scales that share a scale, if they are quantized themselves.
        nested_offset: The mean of the scales, if they are quantized.
    """

    shape: tuple[_Count, _Count]
    blocksize: _Count
    quant_type: str = "nf4"
    nested_blocksize: _Count | None = None
    nested_offset: float | None = None

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes."""
        return -(-math.prod(self.shape) // 2)

    @property
    def blocks(self) -> int:
        """Number of scales."""
        return -(-math.prod(self.shape) // self.blocksize)


def read_state(text: bytes, name: str) -> Nf4State:
    """Read what is stored about a weight.

    Args:
        text: JSON, as bitsandbytes writes it.
        name: Name of the layer, for error messages.

    Returns:
        The state.

    Raises:
        FolderError: If it is not JSON, or lacks what a weight cannot be read without.
    """
    origin = f"{name}.weight.{NF4_STATE}"
    try:
        state = convert(parse_json(text, origin), Nf4State, strict=True)
    except ValidationError as error:
        reason = str(error).replace("`", "'")
        raise FolderError(f"{origin} does not describe an NF4 weight: {reason}") from error
    if state.quant_type != "nf4":
        raise FolderError(f"{origin} says {state.quant_type!r}; mistill reads NF4 only")
    return state


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A weight in 4-bit NormalFloat.

    Attributes:
        codes: Two a byte, the first in the high bits; uint8, flat.
        levels: What the codes stand for before scaling, float32, shape (16,).
        scales: The largest magnitude of each block, float32, flat.
        block_size: Weights that share a scale.
        shape: Outputs and inputs (N, K).
    """

    codes: NDArray[np.uint8]
    levels: NDArray[np.float32]
    scales: NDArray[np.float32]
    block_size: int
    shape: tuple[int, int]

    def dequantize(self) -> NDArray[np.float32]:
        """The weights that the codes stand for.

        Returns:
            Shape (N, K), float32, each the product of its level and its scale.
        """
        # Both levels of a byte are looked up at once, as one number of eight bytes.
        byte = np.arange(256)
        pairs = np.stack([self.levels[byte >> 4], self.levels[byte & 15]], axis=1)
        weights = pairs.view(np.int64)[:, 0][self.codes].view(np.float32)
        count = math.prod(self.shape)
        in_whole_blocks = count // self.block_size * self.block_size
        weights[:in_whole_blocks].reshape(-1, self.block_size)[:] *= self.scales[
            : in_whole_blocks // self.block_size, None
        ]
        if in_whole_blocks < count:
            weights[in_whole_blocks:] *= self.scales[-1]
        return weights[:count].reshape(self.shape)


def read_nf4(tensors: Mapping[str, NDArray[Any]], name: str) -> Nf4Weight:
    """Read a weight that bitsandbytes, or mistill, has saved.

    Args:
        tensors: The tensors of the layer that ``NF4_NAMES`` lists, by name.
        name: Name of the layer, for error messages.

    Returns:
        The weight, its scales as float32 even if they were quantized.

    Raises:
        FolderError: If a tensor is missing, or they contradict one another.
    """
    required = ["weight", "weight.absmax", "weight.quant_map", f"weight.{NF4_STATE}"]
    if "weight.nested_absmax" in tensors:
        required.append("weight.nested_quant_map")
    missing = [tensor for tensor in required if tensor not in tensors]
    if missing:
        raise FolderError(f"{name}.{missing[0]} is missing, so its NF4 weight cannot be read")
    state = read_state(tensors[f"weight.{NF4_STATE}"].tobytes(), name)
    (rows, columns), block = state.shape, state.blocksize
    scales = tensors["weight.absmax"].reshape(-1)
    codes = np.ascontiguousarray(tensors["weight"]).reshape(-1).view(np.uint8)
    if len(codes) != state.code_bytes or len(scales) != state.blocks:
        raise FolderError(
            f"{name} has {len(codes)} bytes of NF4 codes and {len(scales)} scales, which do not "
            f"make {rows} x {columns} weights in blocks of {block}; the file is damaged"
        )
    if "weight.nested_absmax" in tensors:
        if state.nested_blocksize is None or state.nested_offset is None:
            raise FolderError(
                f"{name}.weight.{NF4_STATE} does not say how the scales are quantized"
            )
        steps = tensors["weight.nested_quant_map"].astype(np.float32)[scales]
        outer = tensors["weight.nested_absmax"].astype(np.float32).reshape(-1)
        if len(outer) != -(-len(steps) // state.nested_blocksize):
            raise FolderError(
                f"{name}.weight.nested_absmax holds {len(outer)} scales, which do not make "
                f"{len(steps)} in blocks of {state.nested_blocksize}; the file is damaged"
            )
        owners = np.arange(len(steps)) // state.nested_blocksize
        scales = steps * outer[owners] + np.float32(state.nested_offset)
    levels = tensors["weight.quant_map"].astype(np.float32)
    return Nf4Weight(codes, levels, scales.astype(np.float32), block, (rows, columns))
