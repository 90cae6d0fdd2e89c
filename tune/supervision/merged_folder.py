"""Adapters merged into a model folder, one matrix in memory at a time.

An adapter that was trained on NF4 can be merged into the weights that NF4 was made from, or into
those that it stands for. The second is what was trained; the first is often the better model,
because it has the weights that NF4 had rounded. Both are made, and measured, by ``tuned_folder``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mistill.errors import FolderError
from mistill.folders.folder import FolderInfo, copy_companions, read_config
from mistill.folders.publishing import write_atomically
from mistill.pytorch.loading import decoded, plain_config, stored_tensors
from mistill.pytorch.reading import reading
from mistill.training.adapters import MATRICES, Adapter
from mistill.weights.tensor_writer import TensorWriter
from tune.trainers.tuned_folder import rounded


def merge_adapters(
    info: FolderInfo,
    adapters: Mapping[str, Adapter],
    target: Path,
    *,
    through_nf4: torch.dtype | None = None,
) -> None:
    """Write the plain model that a folder and adapters are together.

    Sums are in float32, and rounded once to the type that the folder has.

    Args:
        info: The model that the adapters were made for: a float folder, or an NF4 one, whose
            weights are decoded.
        adapters: By the name of the matrix' module.
        target: The folder to write, which is not there yet.
        through_nf4: The type in which weights were quantized to NF4 for training, to merge into
            what those stand for; None merges into the weights as they are.

    Raises:
        FolderError: If the folder lacks a matrix, or a sum is too large for its type.
    """
    target.mkdir()
    left = set(adapters)
    with TensorWriter(target) as writer:
        for name, tensor, dtype in _tensors(info):
            module = name.removesuffix(".weight")
            weight = tensor
            if through_nf4 is not None and module.rpartition(".")[2] in MATRICES:
                weight = through_four_bits(tensor, through_nf4)
            if module in adapters:
                left.discard(module)
                weight = adapters[module].merged_into(weight.float())
            writer.add(name, rounded(name, weight, dtype))
    if left:
        raise FolderError(f"{info.path} has no {min(left)}, to which an adapter belongs")
    write_plain_config(info, target)
    copy_companions(info.path, target)


def write_plain_config(info: FolderInfo, target: Path, dtype: str | None = None) -> None:
    """Give a folder the config of a model, byte for byte where nothing has to differ.

    Args:
        info: The model.
        target: A folder with float weights of the same architecture.
        dtype: Type of those weights; None for that of the model.
    """
    if info.form == "model" and dtype is None:
        shutil.copyfile(info.path / "config.json", target / "config.json")
        return
    config = read_config(info.path)
    config.pop("quantization_config", None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    write_atomically(target / "config.json", json.dumps(config, indent=2) + "\n")


def through_four_bits(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What NF4 makes of a matrix, with double quantization, as it is made for training.

    Args:
        weight: Shape (N, K), K a multiple of 64.
        dtype: The type in which it was quantized.

    Returns:
        The same shape, float32.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(
        weight.to(dtype).contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    state.dtype = torch.float32
    floats: Tensor = dequantize_4bit(codes, state)
    return floats


def _tensors(info: FolderInfo) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Names, weights, and the types to store them in."""
    if info.form == "model":
        for name, tensor in stored_tensors(info.path):
            yield name, tensor, tensor.dtype
        return
    config = plain_config(info.path)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    for name, tensor in decoded(info, config):
        yield name, tensor, dtype


def moved_entries(info: FolderInfo, target: Path, names: Container[str] | None) -> tuple[int, int]:
    """How many entries of the trained tensors a tuned model has other values in.

    Args:
        info: The model as it came.
        target: The tuned model, a float folder.
        names: Names of the tensors that were trained; None for all.

    Returns:
        Entries that moved, and entries that were trained.
    """
    moved = total = 0
    with reading(target) as (present, read):
        for name, before, _ in _tensors(info):
            if name in present and (names is None or name in names):
                after = read(name)
                moved += int((after != before.to(after.dtype)).sum())
                total += after.numel()
    return moved, total
