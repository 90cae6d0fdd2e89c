"""Check the tensors of an NF4 folder against what is stored about each weight.

Shapes and types are compared from the headers of the files; only the states of the weights and
their scales are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mistill.errors import FolderError
from mistill.weights.nf4_layout import NF4_STATE, Nf4State, read_state
from mistill.weights.tensor_files import TensorFiles

_MOST_STATE_BYTES = 1 << 16
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def nf4_states(folder: Path) -> dict[str, Nf4State]:
    """What is stored about each NF4 weight of a folder.

    Args:
        folder: A folder whose files are there.

    Returns:
        States by the names of their modules.

    Raises:
        FolderError: If the tensors of a weight contradict one another; the message names one.
    """
    files = TensorFiles(folder)
    states = {}
    for module in _modules(files):
        states[module] = _state(files, module)
        _check(files, module, states[module])
    return states


def nf4_problems(folder: Path) -> list[str]:
    """The weights of a folder that cannot be read as NF4.

    Args:
        folder: A folder whose files are there.

    Returns:
        One phrase for each weight; empty for a sound folder.
    """
    files = TensorFiles(folder)
    faults = []
    for module in _modules(files):
        try:
            _check(files, module, _state(files, module))
        except FolderError as error:
            faults.append(str(error))
    return faults


def _modules(files: TensorFiles) -> Iterator[str]:
    """The modules that bitsandbytes has stored, in whatever format."""
    for name in files:
        module, dot, part = name.rpartition(".weight.")
        has_scales = f"{module}.weight.absmax" in files
        if dot and part == ("absmax" if has_scales else NF4_STATE):
            yield module


def _state(files: TensorFiles, module: str) -> Nf4State:
    name = f"{module}.weight.{NF4_STATE}"
    if name not in files:
        raise FolderError(
            f"{module} is stored by bitsandbytes in another format than NF4: {name} is missing"
        )
    if files.dtype(name) != "U8" or len(files.shape(name)) != 1:
        raise FolderError(f"{name} should hold the letters of a JSON document")
    if files.shape(name)[0] > _MOST_STATE_BYTES:
        raise FolderError(f"{name} is longer than {_MOST_STATE_BYTES} bytes")
    return read_state(files.raw(name).tobytes(), module)


def _check(files: TensorFiles, module: str, state: Nf4State) -> None:
    """Refuse tensors of a weight that do not make it."""
    prefix = f"{module}.weight"
    nested = f"{prefix}.nested_absmax" in files
    sizes = {f"{prefix}.absmax": state.blocks, f"{prefix}.quant_map": 16}
    if nested:
        if state.nested_blocksize is None or state.nested_offset is None:
            raise FolderError(f"{prefix}.{NF4_STATE} does not say how the scales are quantized")
        sizes[f"{prefix}.nested_absmax"] = -(-state.blocks // state.nested_blocksize)
        sizes[f"{prefix}.nested_quant_map"] = 256
    missing = [name for name in (prefix, *sizes) if name not in files]
    if missing:
        raise FolderError(f"{missing[0]} is missing, so that {module} cannot be read")
    rows, columns = state.shape
    if files.size(prefix) != state.code_bytes:
        raise FolderError(
            f"{prefix} has {files.size(prefix)} bytes of codes, and {rows} x {columns} weights "
            f"have {state.code_bytes}"
        )
    for name, count in sizes.items():
        if files.count(name) != count:
            raise FolderError(
                f"{name} holds {files.count(name)} numbers, and {rows} x {columns} weights in "
                f"blocks of {state.blocksize} need {count}"
            )
        types = ("U8",) if nested and name == f"{prefix}.absmax" else _FLOATS
        if files.dtype(name) not in types:
            raise FolderError(f"{name} should be of type {types[-1]}, not {files.dtype(name)}")
        if types is _FLOATS and not np.isfinite(files.floats(name)).all():
            raise FolderError(f"{name} holds a value that is infinite or not a number")
