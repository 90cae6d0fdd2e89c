"""The tensors of a folder, read one at a time from mapped files with numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mistill.errors import FolderError
from mistill.folders.safetensors_file import map_tensor
from mistill.folders.weight_files import tensor_homes
from mistill.weights.gptq_layout import TENSOR_NAMES, GptqFormat, QuantizedWeight, ScaleType, unpack
from mistill.weights.nf4_layout import NF4_NAMES, Nf4Weight, read_nf4

_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class TensorFiles:
    """All tensors of a folder by name; each is read by its own call."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Args:
            folder: A float, GPTQ or NF4 folder.
        """
        self.folder = folder
        self._homes = tensor_homes(folder)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Args:
            name: Its name.

        Returns:
            Its sizes.
        """
        return self._homes[name][1].shape

    def count(self, name: str) -> int:
        """Numbers in a tensor.

        Args:
            name: Its name.

        Returns:
            The product of its sizes.
        """
        return math.prod(self.shape(name))

    def size(self, name: str) -> int:
        """Bytes of a tensor.

        Args:
            name: Its name.

        Returns:
            The bytes.
        """
        return self._homes[name][1].size

    def dtype(self, name: str) -> str:
        """Type of a tensor.

        Args:
            name: Its name.

        Returns:
            Such as float16, bfloat16 or float32; of others the name that safetensors has for it.
        """
        stored = self._homes[name][1].dtype
        return _NAMES.get(stored, stored)

    def raw(self, name: str) -> NDArray[Any]:
        """A tensor as a view of its file; of bfloat16 its bits, as whole numbers.

        Args:
            name: Its name.

        Returns:
            The tensor, whose pages are read when they are used.

        Raises:
            FolderError: If it is of a type that mistill does not read.
        """
        return map_tensor(*self._homes[name])

    def floats(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.floating[Any]]:
        """A tensor of floats, bfloat16 turned into float32 without loss.

        Args:
            name: Its name.
            rows: Which rows to read; all if not given.

        Returns:
            The tensor, in memory.
        """
        stored = self.raw(name)
        values = np.array(stored if rows is None else stored[rows])
        if self.dtype(name) != "bfloat16":
            return values
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def parts(self, module: str, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """The tensors of a module, those that there are.

        Args:
            module: Its name.
            names: The tensors' own names.

        Returns:
            Tensors by their own names, in memory; bfloat16 turned into float32.
        """
        return {
            name: self.floats(f"{module}.{name}") for name in names if f"{module}.{name}" in self
        }


def read_quantized(files: TensorFiles, module: str, layout: GptqFormat) -> QuantizedWeight:
    """Read a matrix that is stored as GPTQ codes.

    Args:
        files: The files of its folder.
        module: Its name.
        layout: What config.json says of them.

    Returns:
        The codes.

    Raises:
        FolderError: If one of its tensors is missing, or they do not belong together.
    """
    form = layout.format_of(module)
    if form is None:
        raise FolderError(f"config.json leaves {module} float, but it is stored as codes")
    for name in ("qzeros", "scales"):
        if f"{module}.{name}" not in files:
            raise FolderError(f"{files.folder} lacks {module}.{name}")
    return unpack(
        files.parts(module, TENSOR_NAMES),
        form.bits,
        form.group_size,
        layout.checkpoint_format,
        cast(ScaleType, files.dtype(f"{module}.scales")),
    )


def read_nf4_weight(files: TensorFiles, module: str) -> Nf4Weight:
    """Read a matrix that is stored in NF4.

    Args:
        files: The files of its folder.
        module: Its name.

    Returns:
        The weight.

    Raises:
        FolderError: If one of its tensors is missing, or they do not belong together.
    """
    tensors = files.parts(module, NF4_NAMES)
    # Codes may be stored as bfloat16, of which only the bits count.
    if f"{module}.weight" in files:
        tensors["weight"] = files.raw(f"{module}.weight")
    return read_nf4(tensors, module)
