"""Open the float folder that is to be quantized, and write the config of the quantized one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import open_folder, read_config
from mistill.folders.lineage import read_lineage
from mistill.folders.publishing import write_json
from mistill.pytorch.loading import check_weights, empty_model, plain_config, require_readable
from mistill.sources.source import resolve_model
from mistill.weights.gptq_layout import (
    GptqFormat,
    codes_per_unit,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class FloatModel:
    """A float model folder that can be quantized.

    Attributes:
        folder: The folder.
        config: Its config.
        matrices: Inputs and outputs (K, N) of the linear modules in its layers, by name.
    """

    folder: Path
    config: PreTrainedConfig
    matrices: dict[str, tuple[int, int]]


def open_float(source: str | Path) -> FloatModel:
    """Open a folder to be quantized, reading no weight.

    Args:
        source: A model folder, a Hub id, or whatever else names a float model.

    Returns:
        The folder and the matrices in its layers.

    Raises:
        FolderError: If the folder is broken, or quantized already.
        ArchitectureError: If it is neither Llama nor Mistral.
    """
    info = open_folder(resolve_model(source))
    if info.form != "model":
        steps = read_lineage(info.path)
        origin = steps[-1].get("source") if steps else None
        raise FolderError(
            f"{source} is {info.form} already; quantize the float model that it was made from"
            + (f", {origin}" if origin else "")
        )
    require_readable(info)
    config = plain_config(info.path)
    check_weights(info.path, config)
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in empty_model(config).named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }
    return FloatModel(info.path, config, linears)


def require_fit(model: FloatModel, bits: int, group_size: int) -> None:
    """Refuse a grid that does not fit every matrix.

    Args:
        model: The model to be quantized.
        bits: Bits per code.
        group_size: Columns per group, -1 for the whole row.

    Raises:
        SettingsError: If groups do not divide a matrix, or its codes do not fill whole words.
    """
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, shape in model.matrices.items():
        last = name.rpartition(".")[2]
        if last not in by_shape.setdefault(shape, []):
            by_shape[shape].append(last)
    unit = codes_per_unit(bits)
    common = math.gcd(*(inputs for inputs, _ in by_shape))
    for (inputs, outputs), names in by_shape.items():
        if group_size != -1 and inputs % group_size:
            largest = max(size for size in (16, 32, 64, 128, 1) if common % size == 0)
            raise SettingsError(
                f"group_size {group_size} does not divide the {inputs} inputs of "
                f"{', '.join(names)}; take "
                + (f"{largest}, or -1 for the whole row" if largest > 1 else "-1")
            )
        if inputs % unit or outputs % unit:
            raise SettingsError(
                f"{bits}-bit codes are stored in runs of {unit}, which the {inputs} inputs and "
                f"{outputs} outputs of {', '.join(names)} do not fill; take 8 bits or NF4"
            )


def write_config(source: Path, target: Path, layout: GptqFormat, **facts: Any) -> None:
    """Write the config of a quantized model: its parent's, and how it was quantized.

    Args:
        source: The float folder.
        target: The folder being made.
        layout: How the tensors are to be read.
        **facts: Further entries of ``quantization_config``.
    """
    from mistill import __version__

    config = read_config(source)
    facts["meta"] = {"quantizer": [f"mistill:{__version__}"]}
    config["quantization_config"] = layout.to_config(**facts)
    write_json(target / "config.json", config)


def tensor_patterns(names: Iterable[str]) -> list[str]:
    """Names of tensors with a star in place of the number of their layer, each once.

    Args:
        names: Names as in a file.

    Returns:
        Patterns in the order of the names.
    """
    patterns = (
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
    )
    return list(dict.fromkeys(patterns))
