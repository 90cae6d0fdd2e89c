"""Convert GPTQ folders from one checkpoint format to the other; codes and zero points stay.

``gptq`` stores zero points minus one, ``gptq_v2`` as they are; nothing else differs. One is
subtracted from, or added to, whole 32-bit words, which is exact: what a zero point of 0 borrows
from its neighbour is restored by the addition. Readers that take each code by itself see the
neighbour one too low, so that asymmetric codes are best left in ``gptq_v2``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mistill.errors import FolderError
from mistill.folders.folder import AUTO_GPTQ_CONFIG, copy_companions, open_folder, read_config
from mistill.folders.lineage import add_lineage
from mistill.folders.publishing import creating, refuse_existing, write_json
from mistill.progress import track
from mistill.pytorch.loading import stored_tensors
from mistill.settings import require
from mistill.sources.source import resolve_model
from mistill.weights.code_words import less_one, plus_one
from mistill.weights.gptq_doctor import examine, require_sound
from mistill.weights.gptq_layout import CheckpointFormat, GptqFormat, read_quantization
from mistill.weights.tensor_writer import TensorWriter

_log = logging.getLogger(__name__)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: CheckpointFormat,
    overwrite: bool = False,
) -> Path:
    """Store the codes of a GPTQ folder in the other checkpoint format.

    Codes, zeros, scales and all other tensors stay what they are; tensors are read and written one
    at a time. A folder that AutoGPTQ named its own way becomes one that transformers reads.

    Args:
        source: A GPTQ folder.
        target: The folder to make.
        to: "gptq" or "gptq_v2".
        overwrite: Whether an existing target is replaced.

    Returns:
        The target.

    Raises:
        SettingsError: If there is no such format.
        FolderError: If the source is broken, contradicts itself, is no GPTQ folder, or has that
            format already.
    """
    formats = get_args(CheckpointFormat)
    require(to in formats, f"to must be {' or '.join(formats)}, not {to!r}")
    target = refuse_existing(target, overwrite, [source])
    info = open_folder(resolve_model(source))
    if info.form != "gptq":
        raise FolderError(f"{source} is {info.kind}; only GPTQ folders have two formats")
    config = read_config(info.path)
    layout = read_quantization(config)
    assert layout is not None, "its form is gptq"
    if layout.checkpoint_format == to:
        raise FolderError(f"{source} is stored as {to} already; use it as it is")
    require_sound(info.path)
    with (
        creating(target, overwrite) as partial,
        TensorWriter(partial) as writer,
        track("Converting", total=info.weight_bytes, unit="bytes") as progress,
    ):
        for name, tensor in stored_tensors(info.path):
            writer.add(name, _converted(name, tensor, layout, to))
            progress.advance(tensor.nbytes)
        _write_configs(info.path, partial, config, to)
        copy_companions(info.path, partial)
        add_lineage(partial, step="convert", settings={"to": to}, source=info.path)
    borrowed = examine(target).borrowed
    if borrowed:
        _log.warning(
            "%s stores %d zero points of 0 minus one, which borrow from the neighbouring code; "
            "readers that add one to each code instead of each word decode the neighbours wrongly",
            target,
            borrowed,
        )
    return target


def _converted(name: str, tensor: Tensor, layout: GptqFormat, to: CheckpointFormat) -> Tensor:
    module, _, part = name.rpartition(".")
    form = layout.format_of(module)
    if part != "qzeros" or form is None:
        return tensor
    words = np.ascontiguousarray(tensor.numpy()).view(np.uint32)
    changed = less_one(words, form.bits) if to == "gptq" else plus_one(words, form.bits)
    return torch.from_numpy(changed.view(np.int32))


def _write_configs(
    source: Path, target: Path, config: dict[str, Any], to: CheckpointFormat
) -> None:
    """Write config.json, and quantize_config.json where the source has one."""
    quantization = {**config["quantization_config"], "checkpoint_format": to}
    if "format" in quantization:
        quantization["format"] = to
    if quantization.pop("model_file_base_name", None):
        quantization["model_file_base_name"] = "model"
    config["quantization_config"] = quantization
    write_json(target / "config.json", config)
    if (source / AUTO_GPTQ_CONFIG).is_file():
        write_json(target / AUTO_GPTQ_CONFIG, quantization)
