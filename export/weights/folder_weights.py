"""The weights of a folder, read one at a time and without PyTorch.

Files are mapped, so that a tensor is in memory only while it is used. Float weights stay floats or
are rounded; GPTQ codes and NF4 levels become blocks of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from export.settings import FAST_2_BIT_BLOCK, LEGAL_BLOCKS, OnnxSettings
from export.weights.architecture import EMBEDDING, HEAD, Architecture
from export.weights.blocks import (
    BlockWeight,
    blocks_of_codes,
    blocks_of_nf4,
    round_to_blocks,
    widen,
)
from export.weights.shapes import MatrixKind, StoredFormat, kind_of
from mistill.cost_model.products import Kernel
from mistill.errors import FolderError, missing_extra
from mistill.folders.folder import read_config, weight_files
from mistill.folders.safetensors_file import read_header
from mistill.weights.gptq_doctor import require_sound
from mistill.weights.gptq_layout import QuantizedWeight, read_quantization
from mistill.weights.nf4_doctor import nf4_states
from mistill.weights.nf4_layout import NF4_STATE
from mistill.weights.tensor_files import TensorFiles, read_nf4_weight, read_quantized

FloatWeight = NDArray[np.float32]
Weight = FloatWeight | BlockWeight

# Precisions that round nothing to codes.
_FLOATS = ("float32", "float16")
_ROUNDED_BITS: dict[str, Literal[4, 8]] = {"int4": 4, "int8": 8}


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer: y = x W^T + b.

    Attributes:
        weight: Float matrix of shape (N, K), or the same in blocks.
        bias: Shape (N,), or None.
    """

    weight: Weight
    bias: FloatWeight | None


class FolderWeights:
    """The tensors of a float, GPTQ or NF4 folder in the format of the export.

    A context manager: the files are mapped until it ends.
    """

    def __init__(self, folder: Path, architecture: Architecture, settings: OnnxSettings) -> None:
        """Read the headers, and refuse weights that do not fit the architecture.

        Args:
            folder: A sound model folder.
            architecture: The architecture that the weights must fit.
            settings: Settings of the export, with the precision of the weights.

        Raises:
            FolderError: If a weight is missing or has another shape; the message names it.
        """
        self._settings = settings
        self._kernels: Mapping[tuple[MatrixKind, int], Kernel] = {}
        self._head = EMBEDDING if architecture.tied else HEAD
        config = read_config(folder)
        self._gptq = read_quantization(config)
        if self._gptq is not None:
            require_sound(folder)
        self._codes = TensorFiles(folder)
        self._nf4_states = nf4_states(folder)
        self._home: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(folder):
            for name, stored in read_header(file).tensors.items():
                self._home[name] = file
                self._shapes[name] = stored.shape
        self._check(folder, architecture)
        self._open = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()
        self._open.close()

    def use_kernels(self, kernels: Mapping[tuple[MatrixKind, int], Kernel]) -> None:
        """Store matrices in the format that some kernels multiply.

        Args:
            kernels: The kernel for each kind of matrix and number of bits in the source; other
                matrices have the format of the settings.
        """
        self._kernels = kernels

    def stored_as(self, module: str, bits: int) -> StoredFormat | None:
        """The format of a matrix, as far as the choice of a kernel depends on it.

        Args:
            module: Its name, without the tensor's own.
            bits: Bits that a float matrix is rounded to; 32 if it stays float.

        Returns:
            The format, or None if there is no choice of kernels.
        """
        largest = self._settings.block_size or max(LEGAL_BLOCKS)
        if self.has(f"{module}.qweight"):
            module_format = None if self._gptq is None else self._gptq.format_of(module)
            if module_format is None or module_format.bits == 2:
                return None
            width = self._shapes[f"{module}.scales"][0]
            columns = self._shapes[f"{module}.qweight"][0] * 32 // module_format.bits
            group = columns if width == 1 else module_format.group_size
            return StoredFormat(module_format.bits, group, largest, widens=module_format.bits < 8)
        if self.has(f"{module}.weight.{NF4_STATE}"):
            group = self._nf4_states[module].blocksize
            return StoredFormat(8, min(group, largest), largest, widens=False)
        return None if bits == 32 else StoredFormat(bits, max(LEGAL_BLOCKS), largest, widens=False)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._home

    def tensor(self, name: str) -> NDArray[Any]:
        """Read one tensor as it is stored.

        Args:
            name: Name of the tensor.

        Returns:
            The tensor.
        """
        file = self._home[name]
        if file not in self._files:
            self._files[file] = self._open.enter_context(_open_safetensors(file))
        tensor: NDArray[Any] = self._files[file].get_tensor(name)
        return tensor

    def floats(self, name: str) -> FloatWeight:
        """Read one tensor as float32.

        Args:
            name: Name of the tensor.

        Returns:
            The tensor.

        Raises:
            FolderError: If it holds something that is not a number.
        """
        tensor = self.tensor(name).astype(np.float32, copy=False)
        if not np.isfinite(tensor).all():
            raise FolderError(
                f"{name} holds a value that is infinite or not a number; its training failed"
            )
        return tensor

    def changes(self, module: str) -> bool:
        """Whether the export rounds a linear layer, so that it is no longer the source's.

        Args:
            module: Its name, without the tensor's own.

        Returns:
            True for float layers that are rounded and for NF4, whose levels move to a grid.
        """
        if self._settings.precision in _FLOATS or self.has(f"{module}.qweight"):
            return False
        return self._settings.precision != "auto" or self.has(f"{module}.weight.{NF4_STATE}")

    def linear(self, module: str) -> Linear:
        """Read a linear layer of the decoder.

        Args:
            module: Its name, without the tensor's own.

        Returns:
            The layer in the precision asked for.
        """
        bias = self.floats(f"{module}.bias") if self.has(f"{module}.bias") else None
        if bias is not None and not bias.any():
            bias = None  # some quantizers write zeros where the model has no bias
        precision = self._settings.precision
        if precision in _FLOATS:
            return Linear(self.exact(module), bias)
        weight = self._stored(module)
        if not isinstance(weight, BlockWeight) and precision in _ROUNDED_BITS:
            weight = self._round(module, weight, _ROUNDED_BITS[precision])
        return Linear(weight, bias)

    def exact(self, module: str) -> FloatWeight:
        """Read a matrix as floats, however it is stored.

        Args:
            module: Its name, without the tensor's own.

        Returns:
            Shape (N, K), exactly as the stored weights represent it.
        """
        codes = self.codes(module)
        if codes is not None:
            return codes.dequantize()
        if self.has(f"{module}.weight.{NF4_STATE}"):
            return read_nf4_weight(self._codes, module).dequantize()
        return self.floats(f"{module}.weight")

    def codes(self, module: str) -> QuantizedWeight | None:
        """Read the codes of a matrix.

        Args:
            module: Its name, without the tensor's own.

        Returns:
            The codes, or None if it is not stored as GPTQ codes.

        Raises:
            FolderError: If config.json does not describe the codes.
        """
        if not self.has(f"{module}.qweight"):
            return None
        if self._gptq is None:
            raise FolderError(
                f"{module} is stored as GPTQ codes, but config.json has no quantization_config"
            )
        return read_quantized(self._codes, module, self._gptq)

    def table(self, module: str, bits: int) -> Weight:
        """Read the embedding or the output head.

        Args:
            module: Its name, without the tensor's own.
            bits: 4, 8 or 32.

        Returns:
            The table; codes of the source are kept unless ``bits`` is 32.
        """
        weight = self._stored(module)
        if isinstance(weight, BlockWeight):
            return weight.dequantize() if bits == 32 else weight
        return weight if bits == 32 else self._round(module, weight, bits)

    def _check(self, folder: Path, architecture: Architecture) -> None:
        if architecture.layers > len(self._home):
            raise FolderError(
                f"config.json of {folder} describes {architecture.layers} layers, and its files "
                f"hold {len(self._home)} tensors in all"
            )
        faults = []
        for module, shape in architecture.shapes().items():
            name, expected = f"{module}.weight", shape
            if self.has(f"{module}.qweight"):
                module_format = None if self._gptq is None else self._gptq.format_of(module)
                bits = 32 if module_format is None else module_format.bits
                name, expected = f"{module}.qweight", (shape[1] * bits // 32, shape[0])
            shape_in_file = self._shapes.get(name)
            if module in self._nf4_states:
                shape_in_file = self._nf4_states[module].shape
            if shape_in_file is None:
                faults.append(f"{name} is missing")
            elif shape_in_file != expected:
                faults.append(f"{name} has the shape {shape_in_file}, not {expected}")
        faults += self._wrong_biases(architecture)
        if faults:
            more = f" and {len(faults) - 3} more" if faults[3:] else ""
            raise FolderError(
                f"{folder} does not hold the model of its config.json: "
                f"{', '.join(faults[:3])}{more}"
            )

    def _wrong_biases(self, architecture: Architecture) -> Iterator[str]:
        """Biases that are missing, and those that the architecture does not have."""
        for module in architecture.shapes():
            has_bias = module.split(".", 3)[-1] in architecture.biased
            if has_bias and not self.has(f"{module}.bias"):
                yield f"{module}.bias is missing"
            if not has_bias and self._has_bias(module):
                yield f"{module}.bias is a bias that its architecture does not have"

    def _has_bias(self, module: str) -> bool:
        """Whether a module has a bias other than the zeros that some quantizers write."""
        name = f"{module}.bias"
        if not self.has(name):
            return False
        return not self.has(f"{module}.qweight") or bool(self._codes.floats(name).any())

    def _stored(self, module: str) -> Weight:
        if self.has(f"{module}.qweight"):
            return self._gptq_blocks(module)
        if self.has(f"{module}.weight.{NF4_STATE}"):
            return self._nf4_blocks(module)
        return self.floats(f"{module}.weight")

    def _round(self, module: str, weight: FloatWeight, bits: int) -> BlockWeight:
        return round_to_blocks(weight, bits, self._block(module, bits))

    def _block(self, module: str, bits: int, usual: int | None = None) -> int:
        """Most columns per block of a matrix whose source has codes of some bits."""
        kernel = self._kernel(module, bits)
        if kernel is not None:
            return kernel.block
        return self._settings.block_size or usual or self._settings.largest_block(bits)

    def _kernel(self, module: str, bits: int) -> Kernel | None:
        """The kernel for a matrix whose source has codes of some bits."""
        kind: MatrixKind | None = "head" if module == self._head else kind_of(module)
        return None if kind is None else self._kernels.get((kind, bits))

    def _gptq_blocks(self, module: str) -> BlockWeight:
        weight = self.codes(module)
        assert weight is not None
        settings = self._settings
        kernel = self._kernel(module, weight.bits)
        if kernel is not None:
            wide = weight.bits < 8 and kernel.form == "int8"
            bits = 4 if weight.bits == 3 else weight.bits
            weight = widen(weight) if wide else replace(weight, bits=bits)
            return blocks_of_codes(weight, kernel.block)
        if weight.bits == 2 and settings.accuracy_level == 4:
            blocks = blocks_of_codes(weight, settings.largest_block(2))
            if blocks.block_size >= FAST_2_BIT_BLOCK:
                return blocks
        if weight.bits in (2, 3):
            # Codes and zero points fit into 4 bits on the same grid, so that no weight changes.
            weight = replace(weight, bits=4)
        return blocks_of_codes(weight, settings.largest_block(weight.bits))

    def _nf4_blocks(self, module: str) -> BlockWeight:
        """Blocks of what bitsandbytes saved, whose scales may be quantized themselves."""
        weight = read_nf4_weight(self._codes, module)
        # Smaller blocks would round activations less, which is little beside the error of NF4.
        block = self._block(module, 8, usual=max(weight.block_size, min(LEGAL_BLOCKS)))
        return blocks_of_nf4(
            weight.codes, weight.levels, weight.scales, weight.shape, weight.block_size, block
        )


def _open_safetensors(file: Path) -> Any:
    from safetensors import safe_open

    try:
        import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    except ModuleNotFoundError as error:
        raise missing_extra("ml-dtypes", "compress") from error
    return safe_open(file, framework="numpy")
