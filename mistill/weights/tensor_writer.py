"""Safetensors written a tensor at a time, so that no folder need fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from mistill.folders.publishing import write_json
from mistill.folders.safetensors_file import (
    NUMPY_TYPES,
    NewTensor,
    StoredTensor,
    write_safetensors,
)
from mistill.weights.gptq_layout import (
    CheckpointFormat,
    QuantizedWeight,
    pack,
)

_SHARD_BYTES = 1 << 30
_COPIED_AT_ONCE = 1 << 24

# What safetensors calls the types that a model may hold.
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
        self._pending: dict[str, StoredTensor] = {}
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
        stored = StoredTensor(_DTYPES[tensor.dtype], shape, self._pending_bytes, tensor.nbytes)
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
        # In the library's own order: wide types first, so that each tensor begins where its type
        # may, then by name.
        types = list(NUMPY_TYPES)
        order = sorted(
            self._pending.items(), key=lambda item: (types.index(item[1].dtype), item[0])
        )
        file = self._folder / f"shard-{len(self._shards)}.safetensors"
        with self._body.open("rb") as body:
            tensors = {
                name: NewTensor(one.dtype, one.shape, one.size, _copied(body, one))
                for name, one in order
            }
            write_safetensors(file, tensors)
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
            write_json(self._folder / "model.safetensors.index.json", index)


def _copied(body: BinaryIO, stored: StoredTensor) -> Iterator[bytes]:
    body.seek(stored.start)
    bytes_left = stored.size
    while bytes_left and (chunk := body.read(min(bytes_left, _COPIED_AT_ONCE))):
        yield chunk
        bytes_left -= len(chunk)


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
