"""Outlier columns, whose large activations are multiplied in float32 beside the codes.

At accuracy level 4 ONNX Runtime rounds activations to 8 bits with one scale for each block of
columns. In a trained decoder a few hidden channels are tens of times as large as the rest, at most
tokens and in most layers (Dettmers et al., 2022, https://arxiv.org/abs/2208.07339), and leave few
of the 255 steps to the other columns of their block. The gain of the norm before the product
divides such a channel, which costs no time, and a float32 product of a few columns adds the
missing part:

    W x  =  W x'  +  (FACTOR - 1) W[:, columns] x'[columns],    x' = x, but x / FACTOR in columns

No code changes, and with a factor that is a power of two nothing is rounded on the way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.settings import MODEL_FILE
from export.weights.architecture import Architecture
from mistill.cost_model.processors import usable_threads

FACTOR = 256
"""Divisor of an outlier column, much larger than outliers are."""

CALIBRATION_TOKENS = 512
"""Tokens of calibration data for the float columns."""

Outliers = Mapping[str, NDArray[np.int64]]
"""By the module name of a norm, the columns of its output that are multiplied in float32."""

_CHUNK = 128
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


def guarded_norms(architecture: Architecture, head_bits: int) -> list[str]:
    """The norms whose outputs are rounded.

    Args:
        architecture: Architecture of the decoder.
        head_bits: Bits of the output head; that of 32 rounds nothing.

    Returns:
        Their module names, in the order of the graph.
    """
    names = [
        f"model.layers.{layer}.{part}"
        for layer in range(architecture.layers)
        for part in ("input_layernorm", "post_attention_layernorm")
    ]
    return names if head_bits == 32 else [*names, "model.norm"]


def find_outliers(
    folder: Path,
    architecture: Architecture,
    norms: list[str],
    ids: NDArray[np.int64],
    count: int,
    block: int,
) -> Outliers:
    """Read a text and find the columns that make the rounding of others coarse.

    Args:
        folder: The folder of a graph without float columns.
        architecture: Architecture of the decoder.
        norms: Module names of norms.
        ids: Shape (T,), tokens to read.
        count: Number of columns for each norm.
        block: Columns that share a scale.

    Returns:
        The columns, ascending.
    """
    activations = _activations(folder, architecture, norms, ids)
    return {norm: np.sort(worst_columns(activations[norm], count, block)) for norm in norms}


def worst_columns(
    activations: NDArray[np.floating[Any]], count: int, block: int
) -> NDArray[np.int64]:
    """The columns whose removal reduces the rounding error most, chosen greedily.

    The squared rounding error of a column grows with the square of the largest number in its
    block. Each step removes the column that reduces the sum of these squares most.

    Args:
        activations: Shape (T, K).
        count: Number of columns.
        block: Columns that share a scale.

    Returns:
        Shape (count,), the most harmful first.
    """
    tokens, columns = activations.shape
    sizes = np.zeros((tokens, -(-columns // block) * block), np.float32)
    sizes[:, :columns] = np.abs(activations)
    blocks = sizes.reshape(tokens, -1, block)
    starts = np.arange(blocks.shape[1]) * block
    chosen = np.empty(count, np.int64)
    for index in range(count):
        largest = blocks.argmax(axis=2)
        two_largest = -np.partition(-blocks, 1, axis=2)[:, :, :2]
        gains = np.square(two_largest[:, :, 0], dtype=np.float64) - np.square(two_largest[:, :, 1])
        saved = np.bincount(
            (largest + starts).ravel(), weights=gains.ravel(), minlength=sizes.shape[1]
        )
        saved[chosen[:index]] = -1
        chosen[index] = saved[:columns].argmax()
        sizes[:, chosen[index]] = 0
    return chosen


def _activations(
    folder: Path, architecture: Architecture, norms: list[str], ids: NDArray[np.int64]
) -> dict[str, NDArray[np.float16]]:
    """The output of each norm at each token, shape (T, K)."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnx_ir
    import onnxruntime

    model = onnx_ir.load(folder / MODEL_FILE)
    outputs: dict[str, str] = {}
    floats = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    for node in model.graph:
        gain = str(node.inputs[-1].name) if node.op_type in _NORMS and node.inputs[-1] else ""
        norm = gain.removesuffix(".weight")
        if norm in norms:
            value = node.outputs[0]
            value.type, outputs[norm] = floats, str(value.name)
            model.graph.outputs.append(value)
    file = folder / "norms.onnx"
    onnx_ir.save(model, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    empty_cache = np.zeros((1, architecture.kv_heads, 0, architecture.head_dim), np.float32)
    past = [entry.name for entry in session.get_inputs() if entry.name.startswith("past")]
    chunks: dict[str, list[NDArray[np.float16]]] = {norm: [] for norm in norms}
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        feeds: dict[str, Any] = {
            "input_ids": chunk[None],
            "attention_mask": np.ones((1, len(chunk)), np.int64),
            "first_logit": np.array([0], np.int64),
            **dict.fromkeys(past, empty_cache),
        }
        outputs_of_chunk = session.run([outputs[norm] for norm in norms], feeds)
        for norm, array in zip(norms, outputs_of_chunk, strict=True):
            chunks[norm].append(np.clip(array[0], -6e4, 6e4).astype(np.float16))
    del session
    file.unlink()
    return {norm: np.concatenate(arrays) for norm, arrays in chunks.items()}
