"""The published AutoGPTQ layout of quantized weights: codes, scales and zeros packed in words.

A linear layer of N outputs and K inputs is four tensors. With b bits, 32 / b codes share an
int32 word, the first in the lowest bits, and G groups of input columns share scales and zeros:

    qweight  int32 (K * b / 32, N)    codes, packed along K
    qzeros   int32 (G, N * b / 32)    zeros, packed along N
    scales   float16 (G, N)
    g_idx    int32 (K,)               the group of each column

    weight[n, k] = scales[g_idx[k], n] * (code[n, k] - zero[g_idx[k], n])

Checkpoint format ``gptq`` stores zeros minus one, subtracted from whole 32-bit words; a zero of 0
therefore borrows from its neighbours, and only an addition to the whole word gives them back.
``gptq_v2`` stores zeros as they are. mistill writes ``gptq`` for symmetric codes, whose zeros are
never 0, and ``gptq_v2`` for asymmetric ones.

Needs numpy alone, so that a laptop without PyTorch can read what was quantized elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError

CheckpointFormat = Literal["gptq", "gptq_v2"]

SUPPORTED_BITS = (4, 8)
TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")
WORD_BITS = 32


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as integer codes on a grid that a group of input columns shares.

    Attributes:
        codes: Shape (N, K), from 0 to 2**bits - 1.
        scales: Shape (N, G), the step of each group's grid. float16 as mistill writes them; files
            written by others may hold another float type.
        zeros: Shape (N, G), the code that stands for 0.
        g_idx: Shape (K,), the group of each column.
        bits: Bits per code.
        group_size: Columns per group; -1 when all columns of a row form one group.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.floating[Any]]
    zeros: NDArray[np.uint8]
    g_idx: NDArray[np.int32]
    bits: int
    group_size: int

    def __post_init__(self) -> None:
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


@dataclass(frozen=True, kw_only=True)
class GptqFormat:
    """What ``quantization_config`` in config.json says about the tensors beside it.

    Attributes:
        bits: Bits per code, 4 or 8.
        group_size: Input columns that share a scale, -1 for the whole row.
        symmetric: Whether zeros are all in the middle of the code range.
        activation_order: Whether columns were walked in the order of their activations, so that
            ``g_idx`` may mix the groups.
        checkpoint_format: Whether zeros are stored minus one ("gptq") or as they are ("gptq_v2").
    """

    bits: int
    group_size: int
    symmetric: bool = True
    activation_order: bool = False
    checkpoint_format: CheckpointFormat = "gptq"

    def to_config(self, **facts: Any) -> dict[str, Any]:
        """What to write as ``quantization_config``, in the names of AutoGPTQ.

        Args:
            **facts: Further entries, such as ``damp_percent``.

        Returns:
            A JSON-able dictionary that transformers, optimum and gptqmodel read.
        """
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.activation_order,
            "checkpoint_format": self.checkpoint_format,
            "lm_head": False,
            **facts,
        }


def read_quantization(config: Mapping[str, Any]) -> GptqFormat | None:
    """Read the GPTQ part of a config.json.

    Args:
        config: The whole config.json.

    Returns:
        None if the model is not quantized by GPTQ.

    Raises:
        FolderError: If it is, but in a way that mistill does not read.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "gptq":
        return None
    try:
        bits, group_size = int(quantization["bits"]), int(quantization["group_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(
            "quantization_config in config.json must give bits and group_size as whole numbers; "
            f"it says bits {quantization.get('bits')!r}, "
            f"group_size {quantization.get('group_size')!r}"
        ) from error
    if bits not in SUPPORTED_BITS:
        raise FolderError(
            f"mistill reads GPTQ weights of 4 or 8 bits, this model has {bits}; quantize its "
            "float original again"
        )
    if group_size == 0 or group_size < -1:
        raise FolderError(
            f"group_size in quantization_config must be above 0, or -1 for the whole row, "
            f"got {group_size}"
        )
    symmetric = bool(quantization.get("sym", True))
    name = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if name not in get_args(CheckpointFormat):
        raise FolderError(
            f"mistill reads GPTQ weights in checkpoint_format gptq or gptq_v2, this model has "
            f"{name!r}; convert it with the library that wrote it, or quantize its float original"
        )
    for option in ("dynamic", "lm_head"):
        if quantization.get(option):
            raise FolderError(
                f"mistill does not read GPTQ models with {option} set in quantization_config; "
                "quantize the float original again"
            )
    return GptqFormat(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        activation_order=bool(quantization.get("desc_act", False)),
        checkpoint_format=cast(CheckpointFormat, name),
    )


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
        weight: The weight; N and K must fill whole 32-bit words.
        checkpoint_format: "gptq" stores zeros minus one, "gptq_v2" as they are.

    Returns:
        The tensors by name: qweight, qzeros, scales, g_idx.

    Raises:
        ValueError: If N or K does not fill whole words.
    """
    lanes = WORD_BITS // weight.bits
    if any(size % lanes for size in weight.codes.shape):
        raise ValueError(
            f"{weight.bits}-bit codes are stored {lanes} to a word, so both sizes of a weight "
            f"must divide by {lanes}; got {weight.codes.shape}"
        )
    zeros = _pack_rows(weight.zeros.T, weight.bits)
    if checkpoint_format == "gptq":
        zeros = zeros - _ones(weight.bits)
    return {
        "qweight": np.ascontiguousarray(_pack_rows(weight.codes, weight.bits).T).view(np.int32),
        "qzeros": zeros.view(np.int32),
        "scales": np.ascontiguousarray(weight.scales.T),
        "g_idx": weight.g_idx.astype(np.int32),
    }


def unpack(
    tensors: Mapping[str, NDArray[Any]],
    bits: int,
    group_size: int,
    checkpoint_format: CheckpointFormat,
) -> QuantizedWeight:
    """Read back what ``pack`` stored.

    Args:
        tensors: qweight, qzeros, scales and, unless the groups are in order, g_idx.
        bits: Bits per code.
        group_size: Columns per group, -1 for the whole row.
        checkpoint_format: Whether zeros were stored minus one.

    Returns:
        The weight with one code per byte.

    Raises:
        FolderError: If the shapes of the tensors do not belong together.
    """
    words = np.ascontiguousarray(tensors["qweight"].T).view(np.uint32)
    codes = _unpack_rows(words, bits)
    zero_words = np.ascontiguousarray(tensors["qzeros"]).view(np.uint32)
    if checkpoint_format == "gptq":
        zero_words = zero_words + _ones(bits)
    zeros = np.ascontiguousarray(_unpack_rows(zero_words, bits).T)
    scales = np.ascontiguousarray(tensors["scales"].T)
    columns = codes.shape[1]
    if "g_idx" in tensors:
        g_idx = tensors["g_idx"].astype(np.int32)
    else:
        per_group = columns if group_size == -1 else group_size
        g_idx = np.arange(columns, dtype=np.int32) // np.int32(per_group)
    outputs, groups = scales.shape
    if (
        len(codes) != outputs
        or zeros.shape != scales.shape
        or g_idx.shape != (columns,)
        or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups
    ):
        raise FolderError(
            f"GPTQ tensors that do not belong together at {bits} bits: qweight gives "
            f"{codes.shape} codes, qzeros {zeros.shape} zeros, scales {scales.shape}, "
            f"g_idx {g_idx.shape}; the file is damaged or its config.json is another model's"
        )
    return QuantizedWeight(codes, scales, zeros, g_idx, bits, group_size)


def _ones(bits: int) -> np.uint32:
    """A word with a 1 in every lane, 0x11111111 for 4 bits."""
    return np.uint32((2**WORD_BITS - 1) // (2**bits - 1))


def _pack_rows(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Pack (R, C) values of one byte each into (R, C * bits / 32) words, first lane lowest."""
    per_byte = 8 // bits
    lanes = np.ascontiguousarray(values).reshape(len(values), -1, per_byte)
    packed = np.zeros(lanes.shape[:2], dtype=np.uint8)
    for lane in range(per_byte):
        packed |= lanes[:, :, lane] << np.uint8(lane * bits)
    return packed.view("<u4").astype(np.uint32, copy=False)


def _unpack_rows(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Unpack (R, C * bits / 32) words into (R, C) values, first lane lowest."""
    packed = words.astype("<u4", copy=False).view(np.uint8)
    per_byte = 8 // bits
    values = np.empty((*packed.shape, per_byte), dtype=np.uint8)
    for lane in range(per_byte):
        values[:, :, lane] = packed >> np.uint8(lane * bits) & np.uint8(2**bits - 1)
    return values.reshape(len(packed), -1)
