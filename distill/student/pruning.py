"""Copy some layers of a model folder, or some of the width of each, into a new one.

A safetensors file is a header and the tensors' bytes. Keeping layers is keeping byte ranges and
renaming them, so a student is cut from a teacher of any size and type in the memory of one copy
buffer, and what is kept is kept to the bit. Where width is cut too, one tensor at a time is read,
cut and written.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from distill.student.width import Cut, KeptWidth, apply_cut, cut_of, narrowed_config
from mistill.folders.folder import read_json, safetensors_header, weight_files
from mistill.progress import Tracker, track

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_COPIED_AT_ONCE = 1 << 24
_HEADER_MULTIPLE = 8
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class _Piece:
    """A tensor to be written, and where it comes from.

    Attributes:
        dtype: Name of its type.
        source_shape: Shape in the source.
        source_begin: Where its bytes begin, behind the source's header.
        source_bytes: How many there are.
        cut: What is kept of it.
    """

    dtype: str
    source_shape: tuple[int, ...]
    source_begin: int
    source_bytes: int
    cut: Cut

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the target."""
        kept = [None if part is None else len(part) for part in self.cut[:2]]
        whole = [*kept, None, None]
        return tuple(
            size if kept is None else kept
            for size, kept in zip(self.source_shape, whole, strict=False)
        )

    @property
    def bytes_per_element(self) -> float:
        """Width of its type."""
        return self.source_bytes / max(1, math.prod(self.source_shape))

    @property
    def bytes(self) -> int:
        """Its bytes in the target."""
        return round(self.bytes_per_element * math.prod(self.shape))


def pruned_config(
    config: Mapping[str, Any], keep: Sequence[int], width: KeptWidth | None = None
) -> dict[str, Any]:
    """The config of a model that keeps some of its layers, and some of their width.

    Args:
        config: config.json of the whole model.
        keep: The layers to keep, in ascending order.
        width: What to keep of each; None for all.

    Returns:
        config.json of the smaller model.
    """
    changed = {**config, "num_hidden_layers": len(keep)}
    if isinstance(config.get("layer_types"), list):
        changed["layer_types"] = [config["layer_types"][layer] for layer in keep]
    # Code of its own and the name of a place say nothing true about the student.
    for name in ("auto_map", "_name_or_path"):
        changed.pop(name, None)
    return changed if width is None else narrowed_config(changed, width)


def copy_layers(
    source: Path, target: Path, keep: Sequence[int], width: KeptWidth | None = None
) -> None:
    """Write the config and the weights of a model that keeps some of another's layers.

    Args:
        source: A float folder.
        target: The folder being made.
        keep: The layers to keep, in ascending order.
        width: What to keep of each; None for all.
    """
    config = pruned_config(read_json(source / "config.json"), keep, width)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    kept = {
        file: _kept_tensors(safetensors_header(file), keep, width) for file in weight_files(source)
    }
    kept = {file: tensors for file, tensors in kept.items() if tensors}
    names = _file_names(len(kept))
    total = sum(piece.bytes for tensors in kept.values() for piece in tensors.values())
    with track("copying layers", total, "B") as bar:
        for name, (file, tensors) in zip(names, kept.items(), strict=True):
            _copy_tensors(file, target / name, tensors, bar)
    if len(kept) > 1:
        places = zip(names, kept.values(), strict=True)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {new: name for name, tensors in places for new in tensors},
        }
        file = target / "model.safetensors.index.json"
        file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _kept_tensors(
    header: Mapping[str, dict[str, Any]], keep: Sequence[int], width: KeptWidth | None
) -> dict[str, _Piece]:
    """The tensors to write by their new names, in an order that keeps every type aligned."""
    new_place = {old: new for new, old in enumerate(keep)}
    kept = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        match = _LAYER.fullmatch(name)
        if match is not None and int(match[1]) not in new_place:
            continue
        begin, end = map(int, entry["data_offsets"])
        cut = Cut() if width is None else cut_of(name, width)
        piece = _Piece(entry["dtype"], tuple(entry["shape"]), begin, end - begin, cut)
        new = name if match is None else f"model.layers.{new_place[int(match[1])]}.{match[2]}"
        kept[new] = piece
    return dict(sorted(kept.items(), key=lambda item: -item[1].bytes_per_element))


def _copy_tensors(source: Path, target: Path, tensors: Mapping[str, _Piece], bar: Tracker) -> None:
    """Write one safetensors file with some tensors of another, under their new names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, piece in tensors.items():
        begin, end = end, end + piece.bytes
        header[name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_MULTIPLE)
    with source.open("rb") as opened, target.open("wb") as written:
        data_start = 8 + struct.unpack("<Q", opened.read(8))[0]
        written.write(struct.pack("<Q", len(text)) + text)
        for piece in tensors.values():
            opened.seek(data_start + piece.source_begin)
            if piece.cut.keeps_all:
                _copy_bytes(opened, written, piece.bytes, bar)
            else:
                written.write(_cut_bytes(opened, piece))
                bar.advance(piece.bytes)


def _cut_bytes(source: BinaryIO, piece: _Piece) -> bytes:
    """Read a tensor and keep some of it."""
    data = bytearray(source.read(piece.source_bytes))
    if len(data) < piece.source_bytes:
        raise EOFError(f"{source.name} ends before its last tensor")
    whole = torch.frombuffer(data, dtype=FLOATS[piece.dtype]).reshape(piece.source_shape)
    kept: bytes = apply_cut(whole, piece.cut).contiguous().view(torch.uint8).numpy().tobytes()
    return kept


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int, bar: Tracker) -> None:
    while count:
        piece = source.read(min(count, _COPIED_AT_ONCE))
        if not piece:
            raise EOFError(f"{source.name} ends before its last tensor")
        target.write(piece)
        bar.advance(len(piece))
        count -= len(piece)
