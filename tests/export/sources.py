"""Quantized folders for the export to read, made here without the package ``quantize``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mistill.weights.gptq_layout import GptqFormat, QuantizedWeight, pack


def quantized_weight(
    weight: NDArray[np.float32],
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    order: NDArray[np.int64] | None = None,
) -> QuantizedWeight:
    """Plain rounding, column by column; ``order`` mixes the groups as act-order does."""
    rows, columns = weight.shape
    width = columns if group_size == -1 else group_size
    walk = np.arange(columns) if order is None else order
    g_idx = np.empty(columns, np.int32)
    g_idx[walk] = np.arange(columns) // width
    groups = -(-columns // width)
    top = 2**bits - 1
    scales = np.zeros((rows, groups), np.float16)
    zeros = np.zeros((rows, groups), np.uint8)
    codes = np.zeros((rows, columns), np.uint8)
    for group in range(groups):
        members = np.flatnonzero(g_idx == group)
        part = weight[:, members]
        if symmetric:
            step = np.abs(part).max(1) * 2 / top
            zero = np.full(rows, 2 ** (bits - 1))
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            step = (high - low) / top
            zero = np.rint(-low / step)
        scales[:, group] = step
        zeros[:, group] = zero
        exact = scales[:, group].astype(np.float32)[:, None]
        codes[:, members] = np.clip(np.rint(part / exact) + zero[:, None], 0, top)
    return QuantizedWeight(codes, scales, zeros, g_idx, bits, group_size)


def gptq_folder(
    model: Path,
    target: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    shared_order: bool = True,
    skip: tuple[str, ...] = (),
) -> tuple[Path, dict[str, QuantizedWeight]]:
    """A GPTQ folder of a float one, and its weights by module name."""
    shutil.copytree(model, target)
    tensors: dict[str, Any] = dict(load_file(target / "model.safetensors"))
    form = GptqFormat(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        activation_order=act_order,
        checkpoint_format="gptq" if symmetric else "gptq_v2",
    )
    weights = {}
    for name in sorted(name for name in tensors if name.endswith("_proj.weight")):
        module = name.removesuffix(".weight")
        if module in skip:
            continue
        weight = tensors.pop(name)
        # Layers that read the same input have the same Hessian, and so the same order.
        inputs = module.rpartition(".")[0] + str(module.endswith(("o_proj", "down_proj")))
        seed = sum((inputs if shared_order else module).encode())
        order = np.random.default_rng(seed).permutation(weight.shape[1]) if act_order else None
        weights[module] = quantized_weight(
            weight, bits=bits, group_size=group_size, symmetric=symmetric, order=order
        )
        packed = pack(weights[module], form.checkpoint_format)
        tensors |= {f"{module}.{part}": array for part, array in packed.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = form.to_config()
    (target / "config.json").write_text(json.dumps(config))
    return target, weights


def nf4_folder(model: Path, target: Path, *, double_quantization: bool = True) -> Path:
    """An NF4 folder of a float one, as transformers and bitsandbytes write it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantized = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=settings, dtype=torch.float32
    )
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    quantized.save_pretrained(target)
    return target
