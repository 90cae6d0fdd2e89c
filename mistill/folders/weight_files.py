"""The safetensors files of a model folder, and where each tensor lies in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mistill.errors import FolderError
from mistill.folders.safetensors_file import StoredTensor, read_header
from mistill.folders.schemas import is_plain_name, read_json

AUTO_GPTQ_CONFIG = "quantize_config.json"

_INDEX = ".safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order.

    A single file comes before an index, as in transformers: whoever saves a model as one file into
    the folder of its parent leaves the index of the parent's shards behind.

    Args:
        folder: A model folder.

    Returns:
        One file, or the shards that the index names; of a folder by AutoGPTQ those under the name
        that it gives them, such as ``gptq_model-4bit-128g.safetensors``.

    Raises:
        FolderError: If the index names no files, or files outside the folder.
    """
    index = weight_index(folder)
    if index is not None:
        return [folder / name for name in _indexed_names(index)]
    names = [f"{base}.safetensors" for base in _base_names(folder)]
    return [next((folder / name for name in names if (folder / name).is_file()), folder / names[0])]


def weight_index(folder: Path) -> Path | None:
    """The index by which the weights of a folder are found.

    Args:
        folder: A model folder.

    Returns:
        Its path; None where the weights are a single file.
    """
    for base in _base_names(folder):
        if (folder / f"{base}.safetensors").is_file():
            return None
        if (folder / f"{base}{_INDEX}").is_file():
            return folder / f"{base}{_INDEX}"
    return None


def unread_index(folder: Path) -> str | None:
    """The index that a single file beside it makes void.

    Args:
        folder: A model folder.

    Returns:
        Its name; None if there is none.
    """
    names = [f"{base}{_INDEX}" for base in _base_names(folder)]
    present = [name for name in names if (folder / name).is_file()]
    return present[0] if present and weight_index(folder) is None else None


def tensor_homes(folder: Path) -> dict[str, tuple[Path, StoredTensor]]:
    """All tensors in the weights of a folder and their files, from the headers of the files.

    Args:
        folder: A model folder.

    Returns:
        Files and places by the names of the tensors.

    Raises:
        FolderError: If a file is damaged.
    """
    return {
        name: (file, stored)
        for file in weight_files(folder)
        for name, stored in read_header(file).tensors.items()
    }


def _base_names(folder: Path) -> list[str]:
    """The names that the weights of a folder may have, without their ending."""
    if not (folder / AUTO_GPTQ_CONFIG).is_file():
        return ["model"]
    quantize_config = read_json(folder / AUTO_GPTQ_CONFIG)
    default = f"gptq_model-{quantize_config.get('bits')}bit-{quantize_config.get('group_size')}g"
    names = ["model", quantize_config.get("model_file_base_name"), default]
    return [name for name in names if isinstance(name, str) and is_plain_name(name)]


def _indexed_names(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, Mapping) else []
    if not names or not all(isinstance(name, str) and is_plain_name(name) for name in names):
        raise FolderError(
            f"{index} is damaged: its weight_map should name a file of the folder for every tensor"
        )
    return sorted(set(names))
