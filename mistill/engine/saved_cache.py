"""What a model has read, on disk: tokens, and their keys and values, in one safetensors file.

Written and read with numpy alone, because the laptop install has no safetensors. The file names
the graph and weights that it is for: keys and values of another model would be nonsense that
nothing notices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError
from mistill.folders.folder import data_start, safetensors_header

_TYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8", "int64": "I64"}
_FORMAT = "mistill key/value cache 1"
_NOTE = "note."


@dataclass(frozen=True, kw_only=True)
class SavedCache:
    """A text that was read.

    Attributes:
        ids: Its tokens.
        values: Keys and values by name, shape (1, heads, tokens, width).
        notes: Texts that were kept with it, by name.
    """

    ids: list[int]
    values: dict[str, NDArray[Any]]
    notes: dict[str, str]


def write_cache(
    file: Path,
    ids: Sequence[int],
    values: Mapping[str, NDArray[Any]],
    *,
    model: str,
    fingerprint: str,
    notes: Mapping[str, str],
) -> Path:
    """Write what was read; the file appears whole or not at all.

    Args:
        file: The file; replaced if it exists.
        ids: The tokens.
        values: Their keys and values.
        model: The name of the model, for the message to those who open it with another.
        fingerprint: Of its graph and weights.
        notes: Texts to keep with it.

    Returns:
        The file.

    Raises:
        FolderError: If there is no such place to write to.
    """
    file = file.expanduser().absolute()
    if not file.parent.is_dir():
        raise FolderError(f"{file} cannot be written: there is no folder {file.parent}")
    tensors = {"ids": np.array(ids, np.int64), **values}
    header: dict[str, Any] = {
        "__metadata__": {
            "format": _FORMAT,
            "model": model,
            "fingerprint": fingerprint,
            **{_NOTE + name: text for name, text in notes.items()},
        }
    }
    place = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _TYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as opened:
            opened.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor in tensors.values():
                opened.write(np.ascontiguousarray(tensor).data)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def read_cache(file: Path, *, model: str, fingerprint: str) -> SavedCache:
    """Read what ``write_cache`` wrote.

    Args:
        file: The file.
        model: The name of the model that it is wanted for.
        fingerprint: Of its graph and weights.

    Returns:
        The text; its keys and values are views of the file.

    Raises:
        FolderError: If the file is missing, damaged, of another kind, or for another model.
    """
    file = file.expanduser()
    if not file.is_file():
        raise FolderError(f"{file}: there is no such file")
    header = safetensors_header(file)
    start = data_start(file)
    with file.open("rb") as opened:
        opened.seek(8)
        about = json.loads(opened.read(start - 8)).get("__metadata__", {})
    if about.get("format") != _FORMAT or "fingerprint" not in about or "ids" not in header:
        raise FolderError(f"{file} does not hold a KV cache; make one with save_cache")
    if about["fingerprint"] != fingerprint:
        raise FolderError(
            f"{file} was written by the model {about.get('model')} ({about['fingerprint'][:12]}), "
            f"not by {model} ({fingerprint[:12]}); open it with that model, or give another file"
        )
    kinds = {stored: name for name, stored in _TYPES.items()}
    arrays = {
        name: np.memmap(
            file,
            kinds[entry["dtype"]],
            "r",
            start + entry["data_offsets"][0],
            tuple(entry["shape"]),
        )
        if 0 not in entry["shape"]
        else np.empty(tuple(entry["shape"]), kinds[entry["dtype"]])
        for name, entry in header.items()
    }
    ids: list[int] = arrays.pop("ids").tolist()
    notes = {
        name.removeprefix(_NOTE): text for name, text in about.items() if name.startswith(_NOTE)
    }
    return SavedCache(ids=ids, values=arrays, notes=notes)
