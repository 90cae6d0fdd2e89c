"""Copy some layers of a model folder, or some of the width of each, into a new one.

A safetensors file is a header and the tensors' bytes. Keeping layers is keeping byte ranges and
renaming them, so a student is cut from a teacher of any size and type in the memory of one copy
buffer, and what is kept is kept to the bit. Where width is cut too, one tensor at a time is read,
cut and written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from distill.student.width import Cut, KeptWidth, apply_cut, cut_of, narrowed_config
from mistill.folders.folder import read_config, weight_files
from mistill.folders.publishing import write_json
from mistill.folders.safetensors_file import (
    Header,
    NewTensor,
    StoredTensor,
    read_header,
    write_safetensors,
)
from mistill.progress import Tracker, track
from mistill.pytorch.loading import completed_config

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_COPIED_AT_ONCE = 1 << 24
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class _Kept:
    """A tensor to be written.

    Attributes:
        stored: Where it lies in the source.
        cut: What is kept of it.
    """

    stored: StoredTensor
    cut: Cut

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the target."""
        sizes = list(self.stored.shape)
        for axis, places in enumerate(self.cut[:2]):
            if places is not None:
                sizes[axis] = len(places)
        return tuple(sizes)

    @property
    def bytes_per_element(self) -> float:
        """Width of its type."""
        return self.stored.size / max(1, math.prod(self.stored.shape))

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
    config = read_config(source) if width is None else completed_config(source)
    config = pruned_config(config, keep, width)
    write_json(target / "config.json", config)
    kept = {file: _kept_tensors(read_header(file), keep, width) for file in weight_files(source)}
    kept = {file: tensors for file, tensors in kept.items() if tensors}
    names = _file_names(len(kept))
    total = sum(one.bytes for tensors in kept.values() for one in tensors.values())
    with track("copying layers", total, "B") as bar:
        for name, (file, tensors) in zip(names, kept.items(), strict=True):
            _copy_tensors(file, target / name, tensors, bar)
    if len(kept) > 1:
        files = zip(names, kept.values(), strict=True)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {tensor: name for name, tensors in files for tensor in tensors},
        }
        file = target / "model.safetensors.index.json"
        write_json(file, index)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _kept_tensors(header: Header, keep: Sequence[int], width: KeptWidth | None) -> dict[str, _Kept]:
    """The tensors to write by their new names, in an order that keeps every type aligned."""
    new_place = {old: new for new, old in enumerate(keep)}
    kept = {}
    for name, stored in sorted(header.tensors.items(), key=lambda item: item[1].start):
        match = _LAYER.fullmatch(name)
        if match is not None and int(match[1]) not in new_place:
            continue
        cut = Cut() if width is None else cut_of(name, width)
        new = name if match is None else f"model.layers.{new_place[int(match[1])]}.{match[2]}"
        kept[new] = _Kept(stored, cut)
    return dict(sorted(kept.items(), key=lambda item: -item[1].bytes_per_element))


def _copy_tensors(source: Path, target: Path, kept: Mapping[str, _Kept], bar: Tracker) -> None:
    """Write one safetensors file with some tensors of another, under their new names."""
    with source.open("rb") as opened:
        tensors = {
            name: NewTensor(one.stored.dtype, one.shape, one.bytes, _chunks(opened, one, bar))
            for name, one in kept.items()
        }
        write_safetensors(target, tensors)


def _chunks(source: BinaryIO, kept: _Kept, bar: Tracker) -> Iterator[bytes]:
    """The bytes of a tensor: as they are, or cut."""
    source.seek(kept.stored.start)
    if not kept.cut.keeps_all:
        values = torch.frombuffer(
            bytearray(source.read(kept.stored.size)), dtype=FLOATS[kept.stored.dtype]
        ).reshape(kept.stored.shape)
        yield apply_cut(values, kept.cut).contiguous().view(torch.uint8).numpy().tobytes()
        bar.advance(kept.bytes)
        return
    bytes_left = kept.bytes
    while bytes_left and (chunk := source.read(min(bytes_left, _COPIED_AT_ONCE))):
        yield chunk
        bar.advance(len(chunk))
        bytes_left -= len(chunk)
