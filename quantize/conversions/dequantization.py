"""Dequantize a folder: decode its codes into float weights.

This is for tools that read no quantized weights, for further training, and for merging an adapter.
No precision comes back: the float folder predicts what the quantized one does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mistill.errors import FolderError
from mistill.folders.folder import copy_companions, open_folder, read_config
from mistill.folders.lineage import add_lineage
from mistill.folders.publishing import creating, refuse_existing, write_json
from mistill.progress import track
from mistill.pytorch.loading import (
    check_weights,
    decoded,
    empty_model,
    plain_config,
    require_readable,
)
from mistill.settings import require
from mistill.sources.source import resolve_model
from mistill.weights.tensor_writer import TensorWriter
from quantize.settings import FloatType


def dequantize(
    source: str | Path,
    target: str | Path,
    *,
    dtype: FloatType = "float32",
    overwrite: bool = False,
) -> Path:
    """Write the float weights that a quantized folder stands for.

    One matrix is in memory at a time. float32 holds what the codes say exactly; the shorter types
    round each weight once.

    Args:
        source: A GPTQ or NF4 folder.
        target: The float folder to make.
        dtype: Type of all weights: float32, float16 or bfloat16.
        overwrite: Whether an existing target is replaced.

    Returns:
        The target.

    Raises:
        SettingsError: If there is no such type.
        FolderError: If the source is broken, contradicts itself, is not quantized, or holds a
            weight that the type cannot.
        ArchitectureError: If it is neither Llama nor Mistral.
    """
    require(
        dtype in get_args(FloatType),
        f"dtype must be one of {', '.join(get_args(FloatType))}, not {dtype!r}",
    )
    target = refuse_existing(target, overwrite, [source])
    info = open_folder(resolve_model(source))
    if info.form not in ("gptq", "nf4"):
        raise FolderError(f"{source} is {info.kind}; give a GPTQ or NF4 folder to dequantize")
    require_readable(info)
    plain = plain_config(info.path)
    check_weights(info.path, plain)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    count = sum(1 for _ in empty_model(plain).parameters())
    with (
        creating(target, overwrite) as partial,
        TensorWriter(partial) as writer,
        track("Dequantizing", total=count, unit="tensors") as progress,
    ):
        for name, tensor in decoded(info, plain):
            writer.add(name, _cast(name, tensor, torch_dtype))
            progress.advance(1)
        _write_config(info.path, partial, dtype)
        copy_companions(info.path, partial)
        add_lineage(partial, step="dequantize", settings={"dtype": dtype}, source=info.path)
    return target


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        if tensor.isfinite().all():
            raise FolderError(
                f"{name} holds weights that {dtype} cannot hold; take bfloat16 or float32"
            )
        raise FolderError(f"{name} holds a value that is not a number; the source is damaged")
    return cast


def _write_config(source: Path, target: Path, dtype: str) -> None:
    config: dict[str, Any] = read_config(source)
    for name in ("quantization_config", "torch_dtype"):
        config.pop(name, None)
    config["dtype"] = dtype
    write_json(target / "config.json", config)
