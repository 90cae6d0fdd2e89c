"""Adapters merged into a model folder, one matrix in memory at a time.

An adapter that was trained on NF4 can be merged into the weights that NF4 was made from, or into
those that it stands for. The second is what was trained; the first is often the better model,
because it has the weights that NF4 had rounded. Both are made, each is measured as it would be
published, and the better one is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistill.errors import FolderError, TrainingError
from mistill.folders.folder import FolderInfo, copy_companions, read_config
from mistill.folders.publishing import write_json
from mistill.pytorch.loading import decoded, plain_config, stored_tensors
from mistill.pytorch.reading import reading
from mistill.training.adapters import (
    CONFIG_FILE,
    MATRICES,
    WEIGHTS_FILE,
    Adapter,
    load_adapters,
)
from mistill.weights.tensor_writer import TensorWriter
from tune.settings import Base
from tune.trainers.tuned_folder import ADAPTER_FOLDER, rounded

AS_TRAINED: dict[Base, str] = {"float": "float", "nf4": "dequantized"}
"""Which way of merging gives what was trained, by how the frozen weights were held."""


@dataclass(frozen=True)
class Merge:
    """The way of merging that was taken.

    Attributes:
        folder: The merged model.
        into: What the adapter was merged into: ``float`` or ``dequantized``.
        figures: What was measured of it, ``loss`` among them.
        losses: The loss of every way, by its name.
    """

    folder: Path
    into: str
    figures: Mapping[str, Any]
    losses: dict[str, float]


def ways_to_merge(
    info: FolderInfo, base: Base, dtype: torch.dtype
) -> dict[str, torch.dtype | None]:
    """What an adapter can be merged into.

    Args:
        info: The model that came.
        base: How its weights were held while the adapter was trained.
        dtype: The type in which they were quantized, where they were.

    Returns:
        ``through_nf4`` of ``merged_tensors`` by name: ``float``, the weights that came, and
        ``dequantized``, what NF4 makes of them.
    """
    if info.form == "nf4":
        return {"dequantized": None}
    return {"float": None, "dequantized": dtype} if base == "nf4" else {"float": None}


def merged_folders(
    work: Path, info: FolderInfo, adapter: Path, base: Base, dtype: torch.dtype
) -> dict[str, Path]:
    """Merge an adapter in every way there is.

    Args:
        work: The folder of the run, in which the merged ones are made.
        info: The model that came.
        adapter: The folder of the adapter, as peft saves it.
        base: How the model was held while the adapter was trained.
        dtype: The type in which its weights were quantized, where they were.

    Returns:
        Folders of language models with the adapter in ``adapter/``, by what it was merged into.
    """
    adapters = load_adapters(adapter)
    folders = {}
    for name, through in ways_to_merge(info, base, dtype).items():
        folder = folders[name] = work / f"merged-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        merge_adapters(info, adapters, folder, through_nf4=through)
        (folder / ADAPTER_FOLDER).mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(adapter / file, folder / ADAPTER_FOLDER / file)
    return folders


def best_merge(folders: Mapping[str, Path], measure: Callable[[Path], Mapping[str, Any]]) -> Merge:
    """Measure every way of merging and take the one of the lowest loss.

    Args:
        folders: From ``merged_folders``.
        measure: Reads a folder and says what it is worth, as figures with a ``loss``.

    Returns:
        The best one; of equal ones the first.
    """
    figures = {name: measure(folder) for name, folder in folders.items()}
    into = min(figures, key=lambda name: figures[name]["loss"])
    losses = {name: float(one["loss"]) for name, one in figures.items()}
    return Merge(folders[into], into, figures[into], losses)


def require_better(
    before: float, after: float, trained_before: float, trained_after: float, *, measure: str
) -> None:
    """Refuse a merged model that is no better than the model that came, where what was trained was.

    Args:
        before: What the model that came is worth; lower is better.
        after: The same of the merged model.
        trained_before: The same of what was trained, before the first step.
        trained_after: The same of what was kept.
        measure: What the numbers are, in words.

    Raises:
        TrainingError: If it is not.
    """
    if not after < before:
        raise TrainingError(
            f"what was trained got better, from {trained_before:.4f} to {trained_after:.4f} "
            f"{measure}, and the merged model is none: {after:.4f}, where the model that came has "
            f"{before:.4f}; train on more tokens, or beside float weights"
        )


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
    with TensorWriter(target) as writer:
        for name, tensor in merged_tensors(info, adapters, through_nf4=through_nf4):
            writer.add(name, tensor)
    write_plain_config(info, target)
    copy_companions(info.path, target)


def merged_tensors(
    info: FolderInfo,
    adapters: Mapping[str, Adapter],
    *,
    through_nf4: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain model that a folder and adapters are together, one at a time.

    Args:
        info: As for ``merge_adapters``.
        adapters: As for ``merge_adapters``.
        through_nf4: As for ``merge_adapters``.

    Yields:
        Names, and tensors in the types in which they are stored.

    Raises:
        FolderError: If the folder lacks a matrix, or a sum is too large for its type.
    """
    left = set(adapters)
    for name, tensor, dtype in _tensors(info):
        module = name.removesuffix(".weight")
        weight = tensor
        if through_nf4 is not None and module.rpartition(".")[2] in MATRICES:
            weight = through_four_bits(tensor, through_nf4)
        if module in adapters:
            left.discard(module)
            weight = adapters[module].merged_into(weight.float())
        yield name, rounded(name, weight, dtype)
    if left:
        raise FolderError(f"{info.path} has no {min(left)}, to which an adapter belongs")


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
    write_json(target / "config.json", config)


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
