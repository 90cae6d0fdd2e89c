"""The folder of a tuned model: merged weights, its adapter, and the companions of its base."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mistill.errors import ArchitectureError, FolderError
from mistill.folders.folder import FolderInfo, copy_companions
from mistill.folders.publishing import write_json
from mistill.pytorch.loading import (
    check_weights,
    plain_config,
    require_readable,
    stored_tensors,
)
from mistill.pytorch.spread import require_nf4_fits
from mistill.sources.source import open_weights
from mistill.training.adapters import merged_parameters
from mistill.weights.tensor_writer import TensorWriter
from tune.settings import Base

ADAPTER_FOLDER = "adapter"
REPORT_FILE = "tuning_report.json"


def tunable_folder(model: str | Path, base: Base, ranks: Sequence[int]) -> FolderInfo:
    """The folder of a model that is to be tuned, looked at before its weights are read.

    Args:
        model: A folder, a Hub id, a .gguf file, or ``@smollm2``.
        base: How its frozen weights will be held.
        ranks: Of the adapters; 0 where all weights are trained.

    Returns:
        What it holds: float weights of an architecture that mistill reads, or such in NF4 for the
        base ``nf4``.

    Raises:
        FolderError: If it is missing or broken, or holds weights that cannot be trained.
        ArchitectureError: If it is neither Llama nor Mistral, its rows do not fit NF4, or a rank is
            above its width.
        MissingExtraError: If bitsandbytes is needed and not installed.
    """
    info = open_weights(model)
    if info.form == "gptq":
        raise FolderError(
            f"{model} holds gptq weights, into which no adapter can be merged; give the float "
            "model that they were made from, or what mistill quantize dequantize makes of them"
        )
    if info.form == "nf4" and base != "nf4":
        raise FolderError(
            f"{model} holds nf4 weights, which can only be tuned through adapters beside them; "
            "set base to nf4, or give the float model that they were made from"
        )
    require_readable(info)
    config = plain_config(info.path)
    check_weights(info.path, config)
    if base == "nf4" and info.form == "model":
        require_nf4_fits(info)
    smallest = min(config.hidden_size, config.intermediate_size)
    if max(ranks) > smallest:
        raise ArchitectureError(
            f"a lora_rank above {smallest}, the width of {model}, is no low rank; lower it, or "
            "train all weights by lora_rank 0"
        )
    return info


def write_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the one adapter of a model as peft does, without a model card.

    Args:
        model: A model of peft.
        folder: The folder to make.
        base: The model that the adapter is for, as its config names it.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir()
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the type in which it is stored.

    Args:
        name: Its name.
        tensor: The tensor, computed in float32.
        dtype: The type.

    Returns:
        The tensor on the CPU.

    Raises:
        FolderError: If it is not finite in that type.
    """
    stored = tensor.detach().cpu().to(dtype)
    if not bool(stored.isfinite().all()):
        raise FolderError(f"{name} became too large for {dtype}; lower learning_rate")
    return stored


def write_merged(model: Any, base: Path, folder: Path) -> None:
    """Write a tuned model in the type of its base, with the base's own files beside it.

    Adapters are merged in float32 and rounded once.

    Args:
        model: A model, or one of peft.
        base: The folder of the model that it was tuned from.
        folder: Where to; the folder is there.

    Raises:
        FolderError: If a sum is too large for its type.
    """
    types = {name: tensor.dtype for name, tensor in stored_tensors(base)}
    with TensorWriter(folder) as writer:
        for name, parameter in merged_parameters(model):
            writer.add(name, rounded(name, parameter, types.get(name, torch.float32)))
    shutil.copyfile(base / "config.json", folder / "config.json")
    copy_companions(base, folder)
    check_weights(folder, plain_config(folder))


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write what tuning did.

    Args:
        folder: The folder of the tuned model.
        report: As JSON values.
    """
    write_json(folder / REPORT_FILE, report, indent=1, ascii_only=False)
