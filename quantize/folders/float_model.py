"""Open the float folder that is to be quantized, and write the folder that comes of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn

from mistill.errors import FolderError, SettingsError
from mistill.folders.folder import open_folder, read_json
from mistill.folders.lineage import read_lineage
from mistill.folders.publishing import write_atomically
from mistill.pytorch.loading import check_weights, empty_model, plain_config, require_readable
from mistill.sources.source import resolve_model
from mistill.weights.gptq_layout import (
    CheckpointFormat,
    GptqFormat,
    QuantizedWeight,
    codes_per_unit,
    pack,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SHARD_BYTES = 1 << 30
_COPIED_AT_ONCE = 1 << 24

# What safetensors calls the types that a model may hold, and its order of them.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_WIDE_LAST = tuple(_DTYPES.values())


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
            f"{source} is {info.form} already; quantize the float model it was made from"
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
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, shape in model.matrices.items():
        kind = name.rpartition(".")[2]
        if kind not in kinds.setdefault(shape, []):
            kinds[shape].append(kind)
    lanes = codes_per_unit(bits)
    common = math.gcd(*(inputs for inputs, _ in kinds))
    for (inputs, outputs), names in kinds.items():
        if group_size != -1 and inputs % group_size:
            largest = max(size for size in (16, 32, 64, 128, 1) if common % size == 0)
            raise SettingsError(
                f"group_size {group_size} does not divide the {inputs} inputs of "
                f"{', '.join(names)}; take "
                + (f"{largest}, or -1 for the whole row" if largest > 1 else "-1")
            )
        if inputs % lanes or outputs % lanes:
            raise SettingsError(
                f"{bits}-bit codes are stored in runs of {lanes}, which the {inputs} inputs and "
                f"{outputs} outputs of {', '.join(names)} do not fill; take 8 bits or NF4"
            )


@dataclass(frozen=True)
class _Stored:
    """A tensor whose bytes have been written down: where they begin, and what they are."""

    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


class TensorWriter:
    """Writes tensors to safetensors files of a bounded size, in the order given.

    Nothing stays in memory: bytes go to the disk at once, and when a file is full they are copied
    behind the header that says what they are. The files are those that safetensors' own
    ``save_file`` writes. A context manager; when it ends, the last file and, if there are several,
    the index are written.
    """

    def __init__(self, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
        """Begin with no file.

        Args:
            folder: Where to write.
            shard_bytes: Size at which a new file is begun.
        """
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._body = folder / "shard.bytes"
        self._opened: BinaryIO | None = None
        self._pending: dict[str, _Stored] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._opened is not None:
                self._opened.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Args:
            name: Its name in the file.
            tensor: Of a type that safetensors has a name for.
        """
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        if self._opened is None:
            self._opened = self._body.open("wb")
        shape = tuple(tensor.shape)
        # Seen as bytes: numpy has no bfloat16. A tensor without dimensions cannot be seen so.
        self._opened.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stored = _Stored(self._pending_bytes, tensor.nbytes, _DTYPES[tensor.dtype], shape)
        self._pending[name] = stored
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def add_quantized(
        self, module: str, weight: QuantizedWeight, checkpoint_format: CheckpointFormat
    ) -> None:
        """Write the four tensors of a quantized matrix.

        Args:
            module: Name of the linear module.
            weight: Its codes.
            checkpoint_format: How zeros are stored.
        """
        for name, tensor in packed_tensors(module, weight, checkpoint_format).items():
            self.add(name, tensor)

    def _flush(self) -> None:
        if self._opened is None:
            self._opened = self._body.open("wb")
        self._opened.close()
        self._opened = None
        self._shards.append(list(self._pending))
        # Wide types first, so that every tensor begins where its type may.
        order = sorted(
            self._pending.items(), key=lambda item: (-_WIDE_LAST.index(item[1].dtype), item[0])
        )
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, stored in order:
            header[name] = {
                "dtype": stored.dtype,
                "shape": stored.shape,
                "data_offsets": (end, end + stored.size),
            }
            end += stored.size
        words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        words += b" " * (-len(words) % 8)
        file = self._folder / f"shard-{len(self._shards)}.safetensors"
        with file.open("wb") as written, self._body.open("rb") as body:
            written.write(len(words).to_bytes(8, "little") + words)
            for _, stored in order:
                body.seek(stored.start)
                left = stored.size
                while left:
                    left -= written.write(body.read(min(left, _COPIED_AT_ONCE)))
        self._body.unlink()
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            name = f"model-{number:05}-of-{count:05}.safetensors"
            if count == 1:
                name = "model.safetensors"
            (self._folder / f"shard-{number}.safetensors").rename(self._folder / name)
            weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_atomically(
                self._folder / "model.safetensors.index.json", json.dumps(index, indent=2)
            )


def packed_tensors(
    module: str, weight: QuantizedWeight, checkpoint_format: CheckpointFormat
) -> dict[str, Tensor]:
    """The four tensors of a quantized matrix.

    Args:
        module: Name of the linear module or table.
        weight: Its codes.
        checkpoint_format: How zeros are stored.

    Returns:
        Tensors by their names in the model.
    """
    tensors = {}
    for name, array in pack(weight, checkpoint_format).items():
        tensor = torch.from_numpy(array)
        if name == "scales" and weight.scale_type == "bfloat16":
            tensor = tensor.to(torch.bfloat16)  # exact: pack has seen to that
        tensors[f"{module}.{name}"] = tensor
    return tensors


def write_config(source: Path, target: Path, layout: GptqFormat, **facts: Any) -> None:
    """Write the config of a quantized model: its parent's, and how it was quantized.

    Args:
        source: The float folder.
        target: The folder being made.
        layout: How the tensors are to be read.
        **facts: Further entries of ``quantization_config``.
    """
    from mistill import __version__

    config = read_json(source / "config.json")
    facts["meta"] = {"quantizer": [f"mistill:{__version__}"]}
    config["quantization_config"] = layout.to_config(**facts)
    write_atomically(target / "config.json", json.dumps(config, indent=2) + "\n")


def tensor_kinds(names: Iterable[str]) -> list[str]:
    """Names of tensors with a star for the number of their layer, each once.

    Args:
        names: Names as in a file.

    Returns:
        Kinds in the order in which they were met.
    """
    kinds = (
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names
    )
    return list(dict.fromkeys(kinds))
