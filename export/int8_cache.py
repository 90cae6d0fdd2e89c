"""An int8 KV cache, which takes a quarter of the memory of a float32 one.

ONNX Runtime's attention stores keys and values as signed bytes with a scale for each channel. The
scales are constants of the graph; calibration data is read once with a float cache to find the
largest magnitude of each channel. The rotary embedding mixes the two channels of a pair, so that
both get the greatest length of the pair as scale, which no position changes. Larger numbers are
clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.checks.parity import Cache, mean_kl, text_runner
from export.settings import MODEL_FILE
from export.weights.architecture import Architecture
from mistill.errors import ExportError
from mistill.shown import one_line

_CHUNK = 256
LARGEST_CODE = 127
_KEY_SCALE, _VALUE_SCALE, _INPUTS = 12, 13, 14


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """Memory and accuracy of an int8 KV cache.

    Attributes:
        calibration_tokens: Number of tokens of the calibration data.
        bytes_per_position: Bytes of a token in the int8 KV cache.
        float_bytes_per_position: Bytes of a token in a float32 KV cache.
        kl_to_float: Mean KL divergence in nats from the same graph with a float cache, on held-out
            text.
        same_top: Share of its positions with the same most probable token.
    """

    calibration_tokens: int
    bytes_per_position: int
    float_bytes_per_position: int
    kl_to_float: float
    same_top: float


def quantize_cache(
    folder: Path,
    architecture: Architecture,
    calibration: NDArray[np.int64],
    held_out: NDArray[np.int64],
) -> CacheReport:
    """Give an exported graph an int8 KV cache.

    Args:
        folder: The folder of the graph; its model.onnx is replaced.
        architecture: Architecture of the decoder.
        calibration: Shape (T,), tokens of the calibration data.
        held_out: Shape (T,), tokens on which the two caches are compared.

    Returns:
        Memory and accuracy of the cache.

    Raises:
        ExportError: If this ONNX Runtime does not support an int8 KV cache.
    """
    run = text_runner(folder, architecture)
    largest: Cache = {}
    # With chunks no longer than the window, the cache drops no row.
    chunk = min(_CHUNK, architecture.sliding_window or _CHUNK)
    for start in range(0, len(calibration), chunk):
        ids = calibration[start : start + chunk]
        _, cache = run(ids, None, last=True)
        for name in cache.keys() - {"tokens"}:
            sizes = _sizes(name, cache[name][:, :, : len(ids)])
            largest[name] = np.maximum(largest.get(name, sizes), sizes)
    floats, _ = run(held_out, None)
    _store_scales(
        folder, architecture, {name: size / LARGEST_CODE for name, size in largest.items()}
    )
    try:
        bytes_, _ = text_runner(folder, architecture)(held_out, None)
    except Exception as error:
        import onnxruntime

        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} does not support an int8 KV cache for this "
            f"model ({one_line(error, 200)}); leave cache at float32"
        ) from error
    width = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim
    return CacheReport(
        calibration_tokens=len(calibration),
        bytes_per_position=width,
        float_bytes_per_position=4 * width,
        kl_to_float=mean_kl(floats, bytes_),
        same_top=float((floats.argmax(-1) == bytes_.argmax(-1)).mean()),
    )


def _sizes(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest magnitude of each channel, shape (1, heads, 1, width).

    Two channels of a key that the rotary embedding mixes share the greatest length of the pair.
    """
    if name.endswith("value"):
        return np.asarray(np.abs(values).max(axis=2, keepdims=True))
    half = values.shape[3] // 2
    lengths = np.hypot(values[..., :half], values[..., half:]).max(axis=2, keepdims=True)
    return np.concatenate([lengths, lengths], axis=3)


def _store_scales(folder: Path, architecture: Architecture, scales: Cache) -> None:
    import onnx_ir

    model = onnx_ir.load(folder / MODEL_FILE)
    graph = model.graph
    bytes_ = onnx_ir.TensorType(onnx_ir.DataType.INT8)
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")):
            value.type = bytes_
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if len(nodes) != architecture.layers:
        raise ExportError(
            f"the graph has {len(nodes)} GroupQueryAttention operators for {architecture.layers} "
            "layers, and only they support an int8 KV cache"
        )
    for layer, node in enumerate(nodes):
        node.resize_inputs(_INPUTS)
        for part, position in (("key", _KEY_SCALE), ("value", _VALUE_SCALE)):
            # A channel that was always 0 has any scale.
            scale = np.maximum(scales[f"{layer}.{part}"], np.float32(1e-8)).astype(np.float32)
            name = f"layers.{layer}.{part}.scale"
            tensor = onnx_ir.tensor(scale, name=name)
            value = onnx_ir.Value(
                name=name,
                type=onnx_ir.TensorType(tensor.dtype),
                shape=onnx_ir.Shape(scale.shape),
                const_value=tensor,
            )
            graph.initializers[name] = value
            node.replace_input_with(position, value)
            short = part[0]
            node.attributes[f"{short}_quant_type"] = onnx_ir.AttrString(
                f"{short}_quant_type", "PER_CHANNEL"
            )
        node.attributes["kv_cache_bit_width"] = onnx_ir.AttrInt64("kv_cache_bit_width", 8)
    onnx_ir.save(model, folder / MODEL_FILE)
