"""A folder whose matrices are stored in every way the layout allows, one way each.

All combinations of bits, symmetry, groups, order of columns and scale type that a folder of one
checkpoint format can hold are in one model of 21 small layers, so that they are tested at once.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mistill.weights.gptq_layout import (
    CheckpointFormat,
    GptqFormat,
    ModuleFormat,
    QuantizedWeight,
    ScaleType,
    pack,
)
from tests.export.sources import quantized_weight
from tests.tiny import tiny_model

WIDTH = 128
Order = Literal["none", "static", "dynamic"]


@dataclass(frozen=True)
class Way:
    """A way to store a matrix."""

    bits: int
    symmetric: bool
    group_size: int
    order: Order
    scale_type: ScaleType


ORDERS: tuple[Order, ...] = get_args(Order)
SCALE_TYPES: tuple[ScaleType, ...] = get_args(ScaleType)
WAYS = tuple(
    Way(bits, symmetric, group_size, order, scale_type)
    for bits, symmetric in itertools.product((4, 8), (True, False))
    for group_size, order in itertools.product((-1, 32, 64, 128), ORDERS)
    for scale_type in SCALE_TYPES
)


def stored_in(weight: QuantizedWeight, scale_type: ScaleType) -> QuantizedWeight:
    """The same codes with scales that a type holds exactly, different in each type."""
    scales = weight.scales.astype(np.float32) * np.float32(1.003)
    if scale_type == "float16":
        scales = scales.astype(np.float16).astype(np.float32)
    if scale_type == "bfloat16":
        scales = torch.from_numpy(scales).bfloat16().float().numpy()
    return replace(weight, scales=scales, scale_type=scale_type)


def quantized_in(weight: np.ndarray, way: Way, seed: int) -> QuantizedWeight:
    """Round a matrix; some zeros of an asymmetric one are 0, as of rows above 0."""
    generator = np.random.default_rng(seed)
    if not way.symmetric:
        weight = weight.copy()
        weight[::5] = np.abs(weight[::5])
    order = generator.permutation(weight.shape[1]) if way.order == "dynamic" else None
    made = quantized_weight(
        weight, bits=way.bits, group_size=way.group_size, symmetric=way.symmetric, order=order
    )
    return stored_in(made, way.scale_type)


def write_folder(
    folder: Path,
    weights: dict[str, QuantizedWeight],
    layout: GptqFormat,
    *,
    without_index: tuple[str, ...] = (),
) -> Path:
    """Replace matrices of a float folder by codes."""
    tensors = load_file(folder / "model.safetensors")
    for module, weight in weights.items():
        tensors.pop(f"{module}.weight", None)
        for name, array in pack(weight, layout.checkpoint_format).items():
            if name == "g_idx" and module in without_index:
                continue
            tensor = torch.from_numpy(array)
            if name == "scales" and weight.scale_type == "bfloat16":
                tensor = tensor.bfloat16()
            tensors[f"{module}.{name}"] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = layout.to_config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def matrix_folder(
    folder: Path, checkpoint_format: CheckpointFormat
) -> tuple[Path, dict[str, QuantizedWeight]]:
    """A model of which each matrix is stored in another way."""
    tiny_model(
        folder,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=-(-len(WAYS) // 7),
    )
    floats = load_file(folder / "model.safetensors")
    names = [
        name.removesuffix(".weight") for name in sorted(floats) if name.endswith("_proj.weight")
    ]
    weights, modules = {}, []
    for number, module in enumerate(names):
        way = WAYS[number % len(WAYS)]
        weights[module] = quantized_in(floats[f"{module}.weight"].numpy(), way, number)
        form = ModuleFormat(bits=way.bits, group_size=way.group_size, symmetric=way.symmetric)
        modules.append((module.replace(".", r"\.") + "$", form))
    layout = GptqFormat(
        bits=4,
        group_size=128,
        activation_order=True,
        checkpoint_format=checkpoint_format,
        modules=tuple(modules),
    )
    return write_folder(folder, weights, layout), weights


def simple_folder(
    folder: Path, way: Way, checkpoint_format: CheckpointFormat, **options: Any
) -> tuple[Path, dict[str, QuantizedWeight]]:
    """A two-layer model with every matrix stored in one way."""
    tiny_model(folder, **options)
    floats = load_file(folder / "model.safetensors")
    names = [name for name in sorted(floats) if name.endswith("_proj.weight")]
    weights = {
        name.removesuffix(".weight"): quantized_in(floats[name].numpy(), way, number)
        for number, name in enumerate(names)
    }
    layout = GptqFormat(
        bits=way.bits,
        group_size=way.group_size,
        symmetric=way.symmetric,
        activation_order=way.order != "none",
        checkpoint_format=checkpoint_format,
    )
    return write_folder(folder, weights, layout), weights
