"""Safetensors files: headers read and checked, tensors mapped, files written as a stream.

A file is the length of a header, the header in JSON, and the tensors' bytes. The safetensors
library checks a header; beyond that it reads whole tensors, and bfloat16 not with numpy alone, and
it writes only what is in memory. Byte ranges and streams are what is added here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mistill.errors import FolderError
from mistill.folders.json_text import parse_json

# Names of types in a file, and the numpy types that their bytes are read as: the wide ones first,
# which is the order in which the library writes tensors.
NUMPY_TYPES = {
    "I64": "<i8",
    "U64": "<u8",
    "F64": "<f8",
    "F32": "<f4",
    "U32": "<u4",
    "I32": "<i4",
    "BF16": "<u2",
    "F16": "<f2",
    "U16": "<u2",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
FLOAT_TYPES = ("F64", "F32", "BF16", "F16")
_LENGTH_BYTES = 8
# The longest header that the library reads.
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
        dtype: Its type by the format's name, such as F32 or BF16.
        shape: Its sizes.
        start: Its first byte, counted from the start of the file.
        size: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What the header of a file says.

    Attributes:
        tensors: Tensors by name, in the order of the header.
        metadata: Texts by name.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read the header of a safetensors file, and check every tensor against the file's size.

    Args:
        file: Path of the file.

    Returns:
        Its tensors and metadata.

    Raises:
        FolderError: If the file is cut short, is not a safetensors file, or its header contradicts
            itself.
    """
    if not file.is_file():
        raise FolderError(f"{file} is missing, or is no regular file")
    if _header_bytes(file) > min(_MOST_HEADER_BYTES, file.stat().st_size):
        raise FolderError(f"{file} is not a safetensors file, or its start is damaged")
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
    except SafetensorError as error:
        raise FolderError(_problem(file, error)) from error
    start, entries = _parse(file)
    tensors = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(entry["dtype"], shape, start + first, last - first)
    return Header(tensors, metadata)


def map_tensor(file: Path, stored: StoredTensor) -> NDArray[Any]:
    """A tensor as a view of its file; of bfloat16 its bits, as whole numbers.

    Args:
        file: Path of the file.
        stored: From its header.

    Returns:
        The tensor, whose pages are read when they are used.

    Raises:
        FolderError: If it is of a type that mistill does not read.
    """
    numpy_type = NUMPY_TYPES.get(stored.dtype)
    if numpy_type is None:
        raise FolderError(f"{file} holds a tensor of type {stored.dtype}, which cannot be read")
    if 0 in stored.shape:
        return np.empty(stored.shape, numpy_type)
    return np.memmap(file, numpy_type, "r", stored.start, stored.shape)


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written.

    Attributes:
        dtype: Its type by the format's name.
        shape: Its sizes.
        size: Its bytes.
        chunks: Its bytes in order, made when they are written.
    """

    dtype: str
    shape: Sequence[int]
    size: int
    chunks: Iterable[Any]


def write_safetensors(
    file: Path, tensors: Mapping[str, NewTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file as a stream.

    Args:
        file: The file; replaced if it exists.
        tensors: Tensors by name, in the order in which they are written. Wide types come first
            where every tensor is to begin where its type may.
        metadata: Texts for the header; by default those that transformers asks for.

    Raises:
        EOFError: If the chunks of a tensor hold more or fewer bytes than its size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name, tensor in tensors.items():
            size = sum(opened.write(chunk) for chunk in tensor.chunks)
            if size != tensor.size:
                raise EOFError(f"{name} has {size} bytes where {tensor.size} were expected")


def _parse(file: Path) -> tuple[int, dict[str, Any]]:
    """The position of the first tensor, and the header without its metadata."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        header = parse_json(opened.read(length), str(file))
    header.pop("__metadata__", None)
    return _LENGTH_BYTES + length, header


def _header_bytes(file: Path) -> int:
    """The length of the header that a file states."""
    with file.open("rb") as opened:
        return int.from_bytes(opened.read(_LENGTH_BYTES), "little")


def _problem(file: Path, error: SafetensorError) -> str:
    """What is wrong with a file that the library refuses."""
    size = file.stat().st_size
    if size < _LENGTH_BYTES + _header_bytes(file):
        return f"{file} is not a safetensors file, or its start is damaged"
    try:
        start, entries = _parse(file)
        expected = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (FolderError, LookupError, TypeError, AttributeError):
        return f"{file} is not a safetensors file, or its start is damaged"
    if size < expected:
        return f"{file} is cut short: {size} of {expected} bytes"
    return f"the header of {file} contradicts itself or the file: {error}"
