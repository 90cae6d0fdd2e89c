"""Copy some layers of a model folder into a new one, tensor by tensor.

A safetensors file is a header and the tensors' bytes. Keeping layers is keeping byte ranges and
renaming them, so a student is cut from a teacher of any size and type in the memory of one copy
buffer, and what is kept is kept to the bit.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mistill.folder import read_json, safetensors_header, weight_files
from mistill.progress import Tracker, track

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_COPIED_AT_ONCE = 1 << 24
_HEADER_MULTIPLE = 8


def pruned_config(config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """The config of a model that keeps some of its layers.

    Args:
        config: config.json of the whole model.
        keep: The layers to keep, in ascending order.

    Returns:
        config.json of the smaller model.
    """
    changed = {**config, "num_hidden_layers": len(keep)}
    if isinstance(config.get("layer_types"), list):
        changed["layer_types"] = [config["layer_types"][layer] for layer in keep]
    # Code of its own and the name of a place say nothing true about the student.
    for name in ("auto_map", "_name_or_path"):
        changed.pop(name, None)
    return changed


def copy_layers(source: Path, target: Path, keep: Sequence[int]) -> None:
    """Write the config and the weights of a model that keeps some of another's layers.

    Args:
        source: A float folder.
        target: The folder being made.
        keep: The layers to keep, in ascending order.
    """
    config = pruned_config(read_json(source / "config.json"), keep)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    kept = {file: _kept_tensors(safetensors_header(file), keep) for file in weight_files(source)}
    kept = {file: tensors for file, tensors in kept.items() if tensors}
    names = _file_names(len(kept))
    total = sum(_bytes(entry) for tensors in kept.values() for entry in tensors.values())
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
    header: Mapping[str, dict[str, Any]], keep: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """The tensors to copy by their new names, in an order that keeps every type aligned."""
    new_place = {old: new for new, old in enumerate(keep)}
    kept = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        match = _LAYER.fullmatch(name)
        if match is None:
            kept[name] = entry
        elif int(match[1]) in new_place:
            kept[f"model.layers.{new_place[int(match[1])]}.{match[2]}"] = entry
    return dict(sorted(kept.items(), key=lambda item: -_bytes_per_element(item[1])))


def _bytes(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end) - int(begin)


def _bytes_per_element(entry: Mapping[str, Any]) -> float:
    elements = 1
    for size in entry["shape"]:
        elements *= size
    return _bytes(entry) / max(1, elements)


def _copy_tensors(
    source: Path, target: Path, tensors: Mapping[str, dict[str, Any]], bar: Tracker
) -> None:
    """Write one safetensors file with some tensors of another, under their new names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        begin, end = end, end + _bytes(entry)
        header[name] = {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_MULTIPLE)
    with source.open("rb") as opened, target.open("wb") as written:
        data_start = 8 + struct.unpack("<Q", opened.read(8))[0]
        written.write(struct.pack("<Q", len(text)) + text)
        for entry in tensors.values():
            opened.seek(data_start + entry["data_offsets"][0])
            _copy_bytes(opened, written, _bytes(entry), bar)


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int, bar: Tracker) -> None:
    while count:
        piece = source.read(min(count, _COPIED_AT_ONCE))
        if not piece:
            raise EOFError(f"{source.name} ends before its last tensor")
        target.write(piece)
        bar.advance(len(piece))
        count -= len(piece)
