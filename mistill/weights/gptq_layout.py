"""The published AutoGPTQ layout of quantized weights: codes, scales and zero points in words.

A linear layer of N outputs and K inputs is four tensors. With b bits, 32 / b codes share an
int32 word, the first in the lowest bits, and G groups of input columns share a scale and a zero
point:

    qweight  int32 (K * b / 32, N)    codes, packed along K
    qzeros   int32 (G, N * b / 32)    zero points, packed along N
    scales   float16 (G, N)           or bfloat16, or float32
    g_idx    int32 (K,)               the group of each column

    weight[n, k] = scales[g_idx[k], n] * (code[n, k] - zero[g_idx[k], n])

Checkpoint format ``gptq`` stores zero points minus one, subtracted from whole 32-bit words; a zero
point of 0 therefore borrows from its neighbours, and only an addition to the whole word restores
them. ``gptq_v2`` stores zero points as they are. mistill writes ``gptq`` for symmetric codes, whose
zero points are never 0, and ``gptq_v2`` for asymmetric ones.

The entries of config.json for this layout are in ``mistill.folders.gptq_format``. An embedding or a
head of V tokens and width D is stored like a linear layer with N = V and K = D; a table that the
two share is stored once, as the embedding.

Needs numpy alone, so that a laptop without PyTorch can read what was quantized elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError
from mistill.folders.gptq_format import (
    EMBEDDING,
    HEAD,
    SUPPORTED_BITS,
    CheckpointFormat,
    GptqFormat,
    ModuleFormat,
    read_quantization,
)
from mistill.weights.code_words import (
    WORD_BITS,
    codes_per_unit,
    less_one,
    pack_rows,
    plus_one,
    unpack_rows,
)

ScaleType = Literal["float16", "bfloat16", "float32"]

TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")

__all__ = [
    "EMBEDDING",
    "HEAD",
    "SUPPORTED_BITS",
    "TENSOR_NAMES",
    "WORD_BITS",
    "CheckpointFormat",
    "GptqFormat",
    "ModuleFormat",
    "QuantizedWeight",
    "ScaleType",
    "codes_per_unit",
    "pack",
    "quantized_modules",
    "read_quantization",
    "unpack",
]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as integer codes on a grid that a group of input columns shares.

    Attributes:
        codes: Shape (N, K), from 0 to 2**bits - 1.
        scales: Shape (N, G), the step of each group's grid, exact in ``scale_type``.
        zeros: Shape (N, G), the zero points: the codes that stand for 0.
        g_idx: Shape (K,), the group of each column.
        bits: Bits per code.
        group_size: Columns per group; -1 when all columns of a row form one group.
        scale_type: The type that scales are stored in. numpy has no bfloat16: such scales are
            held in float32.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.floating[Any]]
    zeros: NDArray[np.uint8]
    g_idx: NDArray[np.int32]
    bits: int
    group_size: int
    scale_type: ScaleType = "float16"

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits must be 2, 3, 4 or 8, got {self.bits}")
        if self.scale_type not in get_args(ScaleType):
            raise ValueError(f"scale_type must be a float type, got {self.scale_type!r}")
        outputs, columns = self.codes.shape
        if self.scales.shape != self.zeros.shape or len(self.scales) != outputs:
            raise ValueError(
                f"codes {self.codes.shape} need scales and zeros (N, G) of one shape, got "
                f"{self.scales.shape} and {self.zeros.shape}"
            )
        if self.g_idx.shape != (columns,):
            raise ValueError(f"g_idx must have shape ({columns},), got {self.g_idx.shape}")

    @property
    def columns_per_group(self) -> int:
        """Number of input columns that share a scale, K when the whole row does."""
        return self.codes.shape[1] if self.group_size == -1 else self.group_size

    @property
    def symmetric(self) -> bool:
        """Whether every zero is the middle of the code range."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    @property
    def ordered(self) -> bool:
        """Whether the columns of a group lie side by side, in the order of the groups."""
        plain = np.arange(len(self.g_idx)) // self.columns_per_group
        return bool((self.g_idx == plain).all())

    def dequantize(self) -> NDArray[np.float32]:
        """The weight that the codes stand for.

        Returns:
            Shape (N, K).
        """
        scales = self.scales.astype(np.float32)[:, self.g_idx]
        steps = self.codes.astype(np.float32)
        steps -= self.zeros.astype(np.float32)[:, self.g_idx]
        steps *= scales
        return steps


def quantized_modules(tensor_names: Iterable[str]) -> list[str]:
    """The linear layers that are stored as codes.

    Args:
        tensor_names: Names of all tensors in a folder.

    Returns:
        Module names without the tensor's own, in the order met.
    """
    suffix = ".qweight"
    return [name.removesuffix(suffix) for name in tensor_names if name.endswith(suffix)]


def pack(
    weight: QuantizedWeight, checkpoint_format: CheckpointFormat
) -> dict[str, NDArray[np.generic]]:
    """Store a weight as the four tensors of the AutoGPTQ layout.

    Args:
        weight: The weight. K must fill whole words; the last word of zero points is padded
            where N does not.
        checkpoint_format: "gptq" stores zeros minus one, "gptq_v2" as they are.

    Returns:
        The tensors by name: qweight, qzeros, scales, g_idx. bfloat16 scales are given as float32,
        which whoever writes them turns into bfloat16 without loss.

    Raises:
        ValueError: If K does not fill whole words, or a scale is not exact in its type.
    """
    unit = codes_per_unit(weight.bits)
    if weight.codes.shape[1] % unit:
        raise ValueError(
            f"{weight.bits}-bit codes are stored in runs of {unit}, so the columns of a weight "
            f"must divide by {unit}; got {weight.codes.shape}"
        )
    zeros = pack_rows(weight.zeros.T, weight.bits)
    if checkpoint_format == "gptq":
        zeros = less_one(zeros, weight.bits)
    return {
        "qweight": np.ascontiguousarray(pack_rows(weight.codes, weight.bits).T).view(np.int32),
        "qzeros": zeros.view(np.int32),
        "scales": np.ascontiguousarray(_stored_scales(weight).T),
        "g_idx": weight.g_idx.astype(np.int32),
    }


def _stored_scales(weight: QuantizedWeight) -> NDArray[np.floating[Any]]:
    scales = weight.scales.astype(np.float32, copy=False)
    if weight.scale_type == "bfloat16":
        exact = not (scales.view(np.uint32) & np.uint32(0xFFFF)).any()
        stored: NDArray[np.floating[Any]] = scales
    else:
        stored = weight.scales.astype(weight.scale_type, copy=False)
        exact = np.array_equal(stored.astype(np.float32, copy=False), scales)
    if not exact:
        raise ValueError(f"the scales of a weight are not exact in {weight.scale_type}")
    return stored


def unpack(
    tensors: Mapping[str, NDArray[Any]],
    bits: int,
    group_size: int,
    checkpoint_format: CheckpointFormat,
    scale_type: ScaleType | None = None,
) -> QuantizedWeight:
    """Read back what ``pack`` stored.

    Args:
        tensors: qweight, qzeros, scales and, unless the groups are in order, g_idx.
        bits: Bits per code.
        group_size: Columns per group, -1 for the whole row.
        checkpoint_format: Whether zeros were stored minus one.
        scale_type: The type that scales were stored in; that of the array given if None.

    Returns:
        The weight with one code per byte.

    Raises:
        FolderError: If the shapes or types of the tensors do not belong together.
    """
    scales = np.ascontiguousarray(tensors["scales"].T)
    stored_as = scale_type or str(scales.dtype)
    if stored_as not in get_args(ScaleType):
        raise FolderError(
            f"the GPTQ scales are of type {stored_as}; mistill reads "
            f"{', '.join(get_args(ScaleType))}"
        )
    if str(scales.dtype) == "bfloat16":
        scales = scales.astype(np.float32)
    if bits == 3 and (tensors["qweight"].shape[0] % 3 or tensors["qzeros"].shape[1] % 3):
        raise FolderError(
            "the GPTQ tensors do not fit one another at 3 bits: the number of their words is not a "
            "multiple of three; the file is damaged or its config.json is another model's"
        )
    codes = unpack_rows(tensors["qweight"].T.astype(np.int32, copy=False).view(np.uint32), bits)
    zero_words = np.ascontiguousarray(tensors["qzeros"]).view(np.uint32)
    if checkpoint_format == "gptq":
        zero_words = plus_one(zero_words, bits)
    outputs, groups = scales.shape
    # The last word of zero points is padded where the outputs do not fill it.
    zeros = unpack_rows(zero_words, bits)
    if 0 <= zeros.shape[1] - outputs < codes_per_unit(bits):
        zeros = zeros[:, :outputs]
    zeros = np.ascontiguousarray(zeros.T)
    columns = codes.shape[1]
    if "g_idx" in tensors:
        g_idx = tensors["g_idx"].astype(np.int32)
    else:
        per_group = columns if group_size == -1 else group_size
        g_idx = np.arange(columns, dtype=np.int32) // np.int32(per_group)
    if (
        len(codes) != outputs
        or zeros.shape != scales.shape
        or g_idx.shape != (columns,)
        or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups
    ):
        raise FolderError(
            f"the GPTQ tensors do not fit one another at {bits} bits: qweight holds "
            f"{codes.shape} codes, qzeros {zeros.shape} zero points, scales {scales.shape}, "
            f"g_idx {g_idx.shape}; the file is damaged or its config.json is another model's"
        )
    return QuantizedWeight(
        codes, scales, zeros, g_idx, bits, group_size, cast(ScaleType, stored_as)
    )
