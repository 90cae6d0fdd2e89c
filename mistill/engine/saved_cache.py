"""A KV cache on disk: tokens with their keys and values in one safetensors file.

The file holds a fingerprint of the graph and its weights, because keys and values of another model
would give wrong logits without an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError
from mistill.folders.publishing import replacing
from mistill.folders.safetensors_file import (
    NewTensor,
    map_tensor,
    read_header,
    write_safetensors,
)

_TYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8", "int64": "I64"}
_FORMAT = "mistill key/value cache 1"
_NOTE = "note."
_CHECKSUM = "sha256"
_READ_TOGETHER = "read_together"


@dataclass(frozen=True, kw_only=True)
class SavedCache:
    """A KV cache that was read from a file.

    Attributes:
        ids: Token ids of the text.
        values: Keys and values by name, shape (1, heads, tokens, width).
        read_together: See ``KeyValueCache.read_together``; 0 in files of earlier versions.
        notes: Texts that were saved with it, by name.
    """

    ids: list[int]
    values: dict[str, NDArray[Any]]
    read_together: int
    notes: dict[str, str]


def write_cache(
    file: Path,
    ids: Sequence[int],
    values: Mapping[str, NDArray[Any]],
    *,
    read_together: int,
    model: str,
    fingerprint: str,
    notes: Mapping[str, str],
) -> Path:
    """Write a KV cache; the file appears whole or not at all.

    Args:
        file: The file; replaced if it exists.
        ids: Token ids of the text.
        values: Their keys and values.
        read_together: See ``KeyValueCache.read_together``.
        model: The name of the model, for the message to those who open it with another.
        fingerprint: Of its graph and weights.
        notes: Texts to keep with it.

    Returns:
        The file.

    Raises:
        FolderError: If the parent folder does not exist, or the disk is full.
    """
    file = file.expanduser().absolute()
    if not file.parent.is_dir():
        raise FolderError(f"{file} cannot be written: there is no folder {file.parent}")
    metadata = {
        "format": _FORMAT,
        "model": model,
        "fingerprint": fingerprint,
        **{_NOTE + name: text for name, text in notes.items()},
    }
    together = np.array([read_together], np.int64)
    arrays = {"ids": np.array(ids, np.int64), _READ_TOGETHER: together, **values}
    metadata[_CHECKSUM] = _checksum(arrays, notes)
    tensors = {
        name: NewTensor(_TYPES[array.dtype.name], array.shape, array.nbytes, _bytes_of(array))
        for name, array in arrays.items()
    }
    with replacing(file) as partial:
        write_safetensors(partial, tensors, metadata)
    return file


def read_cache(file: Path, *, model: str, fingerprint: str) -> SavedCache:
    """Read what ``write_cache`` wrote.

    Args:
        file: Path of the file.
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
    try:
        header = read_header(file)
    except FolderError as error:
        raise FolderError(f"{file} is damaged: {error}") from error
    metadata = header.metadata
    if (
        metadata.get("format") != _FORMAT
        or "fingerprint" not in metadata
        or "ids" not in header.tensors
    ):
        raise FolderError(f"{file} does not hold a KV cache; make one with save_cache")
    if metadata["fingerprint"] != fingerprint:
        raise FolderError(
            f"{file} was written by the model {metadata.get('model')} "
            f"({metadata['fingerprint'][:12]}), not by {model} ({fingerprint[:12]}); open it with "
            "that model, or give another file"
        )
    arrays = {name: map_tensor(file, stored) for name, stored in header.tensors.items()}
    notes = {
        name.removeprefix(_NOTE): text for name, text in metadata.items() if name.startswith(_NOTE)
    }
    # Files of versions before there was a checksum have none.
    if metadata.get(_CHECKSUM, "") not in ("", _checksum(arrays, notes)):
        raise FolderError(f"{file} is damaged: its checksum is not that of its content")
    ids = arrays.pop("ids")
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise FolderError(f"{file} is damaged: its tokens are not a list of whole numbers")
    together = arrays.pop(_READ_TOGETHER, np.zeros(1, np.int64))
    if together.shape != (1,) or together.dtype != np.int64 or not 0 <= together[0] <= ids.size:
        raise FolderError(f"{file} is damaged: {_READ_TOGETHER} does not fit its tokens")
    return SavedCache(ids=ids.tolist(), values=arrays, read_together=int(together[0]), notes=notes)


def _checksum(arrays: Mapping[str, NDArray[Any]], notes: Mapping[str, str]) -> str:
    """SHA-256 of all that a file holds: names, types, sizes and bytes of arrays, and notes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    for name, text in sorted(notes.items()):
        digest.update(f"{name} {len(text)}\n{text}".encode())
    return digest.hexdigest()


def _bytes_of(array: NDArray[Any]) -> Iterator[memoryview]:
    yield np.ascontiguousarray(array).data
