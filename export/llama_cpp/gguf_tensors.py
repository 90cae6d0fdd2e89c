"""The weights of a decoder as llama.cpp keeps them: its names, its order of rows, its blocks.

A quantized matrix of llama.cpp is rows of blocks of 32 weights, each with a float16 scale d:

    q8_0    d * q            q from -128 to 127
    q4_0    d * (q - 8)      q from 0 to 15
    q4_1    d * q + m        q from 0 to 15, m a float16 too

Symmetric codes of a GPTQ folder whose groups are runs of whole blocks are such blocks already, and
go over as they are; so do asymmetric ones into q4_1, whose m = -d * zero is rounded to float16,
and into q8_0 where code - zero fits. Whatever else is rounded to the nearest.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.settings import GgufType
from export.weights.architecture import EMBEDDING, HEAD, NORM, Architecture, plain_frequencies
from export.weights.folder_weights import FolderWeights
from mistill.errors import ExportError
from mistill.weights.gptq_layout import QuantizedWeight

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_log = logging.getLogger(__name__)

BLOCK = 32
BLOCKS: tuple[GgufType, ...] = ("q8_0", "q4_0", "q4_1")
ROPE_FACTORS = "rope_freqs.weight"

_TABLES = {EMBEDDING: "token_embd", NORM: "output_norm", HEAD: "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, before its values are read.

    Attributes:
        name: Name of the tensor in llama.cpp.
        source: Name of the tensor in transformers; empty for a tensor that is computed.
        shape: Its sizes, (N, K) of a matrix.
        type: Type of the stored values.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: GgufType

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        """The library's name for its type."""
        from gguf import GGMLQuantizationType

        names = {"float32": "F32", "float16": "F16"}
        return GGMLQuantizationType[names.get(self.type, self.type.upper())]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its sizes as numpy holds it: bytes in place of columns if it is in blocks."""
        if self.type not in BLOCKS:
            return self.shape
        from gguf import quant_shape_to_byte_shape

        return tuple(quant_shape_to_byte_shape(self.shape, self.ggml_type))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its elements as numpy holds it."""
        floats = {"float32": np.float32, "float16": np.float16}
        return np.dtype(floats.get(self.type, np.uint8))


def plan_tensors(
    architecture: Architecture, weights: FolderWeights, types: Mapping[str, GgufType]
) -> list[GgufTensor]:
    """All tensors of the file, in its order.

    Vectors stay float32. A matrix whose rows are no whole number of blocks becomes float16, and is
    named in the log.

    Args:
        architecture: Architecture of the decoder.
        weights: Its weights, of which only the names are read.
        types: Types of the matrices, by the names of the modules.

    Returns:
        Tensors without their values.
    """
    tensors = []
    odd = []
    for module, shape in architecture.shapes().items():
        tensor_type: GgufType = "float32"
        if len(shape) == 2:
            tensor_type = types[module]
            if tensor_type in BLOCKS and shape[1] % BLOCK:
                odd.append(module)
                tensor_type = "float16"
        name = gguf_name(module)
        tensors.append(GgufTensor(f"{name}.weight", f"{module}.weight", shape, tensor_type))
        bias = f"{module}.bias"
        # Some quantizers write zeros where the model has no bias.
        codes = weights.has(f"{module}.qweight")
        if weights.has(bias) and (not codes or weights.floats(bias).any()):
            tensors.append(GgufTensor(f"{name}.bias", bias, shape[:1], "float32"))
    if architecture.rotary.kind == "llama3":
        half = (architecture.head_dim // 2,)
        tensors.append(GgufTensor(ROPE_FACTORS, "", half, "float32"))
    if odd:
        _log.warning(
            "%d matrices become float16, because their rows cannot be split into blocks of %d: %s",
            len(odd),
            BLOCK,
            ", ".join(odd[:3]),
        )
    return tensors


def gguf_name(module: str) -> str:
    """What llama.cpp calls a module.

    Args:
        module: Its name in transformers.

    Returns:
        Its name, without that of the tensor.
    """
    if module in _TABLES:
        return _TABLES[module]
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[part]}"


def read_values(
    tensors: list[GgufTensor], architecture: Architecture, weights: FolderWeights, *, pairs: bool
) -> Iterator[NDArray[Any]]:
    """The values of the planned tensors, one at a time.

    Args:
        tensors: Tensors that ``plan_tensors`` returned.
        architecture: Architecture of the decoder.
        weights: Weights of the decoder.
        pairs: Whether rows of q and k that are rotated together stand side by side.

    Yields:
        Values as they are written.

    Raises:
        ExportError: If a weight is too large for its type.
    """
    again: Counter[GgufType] = Counter()
    for tensor in tensors:
        if tensor.name == ROPE_FACTORS:
            plain = plain_frequencies(architecture.rotary.base, architecture.head_dim)
            yield (plain / architecture.frequencies).astype(np.float32)
            continue
        module, _, part = tensor.source.rpartition(".")
        heads = _heads(module, architecture) if pairs else 0
        order = pairs_of_halves(tensor.shape[0], heads) if heads else None
        codes = weights.codes(module) if part == "weight" else None
        if codes is not None:
            blocks = _blocks_of_codes(codes, tensor.type)
            if blocks is not None:
                yield blocks if order is None else blocks[order]
                continue
            again[tensor.type] += tensor.type in BLOCKS
        vector = len(tensor.shape) == 1
        values = weights.floats(tensor.source) if vector else weights.exact(module)
        yield _stored(values if order is None else values[order], tensor)
    if again.total():
        _log.warning(
            "the codes of %d matrices do not fit the blocks of llama.cpp (act-order mixes their "
            "groups, or their grid differs) and were rounded again, to %s; dtype float16 loses "
            "less",
            again.total(),
            ", ".join(sorted(+again)),
        )


def _heads(module: str, architecture: Architecture) -> int:
    """Heads whose rows llama.cpp orders in its own way; 0 for all but q and k."""
    if module.endswith("self_attn.q_proj"):
        return architecture.heads
    return architecture.kv_heads if module.endswith("self_attn.k_proj") else 0


def pairs_of_halves(rows: int, heads: int) -> NDArray[np.int64]:
    """The order of rows in which the two numbers that are rotated together stand side by side.

    transformers keeps the first ones of all pairs in the first half of a head.

    Args:
        rows: heads * head_dim.
        heads: Heads of the projection.

    Returns:
        Shape (rows,), the row that goes to each place.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _stored(values: NDArray[np.float32], tensor: GgufTensor) -> NDArray[Any]:
    from gguf.quants import quantize

    with np.errstate(over="ignore"):
        stored: NDArray[Any] = quantize(np.ascontiguousarray(values), tensor.ggml_type)
    # Blocks have float16 scales, which are too small to overflow where float16 itself does.
    if tensor.type == "float16" and not np.isfinite(stored).all():
        raise ExportError(
            f"{tensor.source} holds a weight of {np.abs(values).max():.3g}, too large for float16; "
            "nothing was written: export with dtype float32 or q8_0"
        )
    return stored


def _blocks_of_codes(weight: QuantizedWeight, tensor_type: GgufType) -> NDArray[np.uint8] | None:
    """Codes of a checkpoint as blocks of llama.cpp, or None if they are not of that kind."""
    groups = weight.g_idx
    if tensor_type not in BLOCKS or len(groups) % BLOCK:
        return None
    per_block = groups.reshape(-1, BLOCK)
    if (per_block != per_block[:, :1]).any():
        return None
    scales = weight.scales.astype(np.float32)[:, per_block[:, 0]]
    zeros = weight.zeros[:, per_block[:, 0]].astype(np.int16)
    codes = weight.codes.reshape(len(weight.codes), -1, BLOCK)
    if not np.array_equal(scales.astype(np.float16).astype(np.float32), scales):
        return None  # bfloat16 scales may need more than float16 has
    parts = [scales.astype(np.float16)[..., None].view(np.uint8)]
    if tensor_type == "q4_1":
        if weight.bits > 4:
            return None
        offsets = (-scales * zeros).astype(np.float16)
        if not np.isfinite(offsets).all():
            return None
        parts += [offsets[..., None].view(np.uint8), _nibbles(codes)]
    else:
        steps = codes.astype(np.int16) - zeros[..., None]
        lowest = -8 if tensor_type == "q4_0" else -128
        if steps.min() < lowest or steps.max() >= -lowest:
            return None
        if tensor_type == "q4_0":
            parts.append(_nibbles((steps + 8).astype(np.uint8)))
        else:
            parts.append(steps.astype(np.int8).view(np.uint8))
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes to a byte, the first half of a block in the low bits, the second in the high."""
    half = BLOCK // 2
    return codes[..., :half] | (codes[..., half:] << np.uint8(4))
