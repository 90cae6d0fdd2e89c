"""The float weights of a folder, decoded from whatever they are stored as, one at a time.

Names are those of the plain architecture: a matrix stored as GPTQ or NF4 codes has one weight. The
only reader of codes as floats; needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.folders.folder import read_config
from mistill.weights.gptq_layout import TENSOR_NAMES, read_quantization
from mistill.weights.nf4_layout import NF4_STATE
from mistill.weights.tensor_files import TensorFiles, read_nf4_weight, read_quantized


class PlainWeights:
    """The weights of a float, GPTQ or NF4 folder by their names in the plain architecture."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Args:
            folder: A float folder, an NF4 folder, or a GPTQ folder that passes
                ``mistill.weights.gptq_doctor.require_sound``.
        """
        self._files = TensorFiles(folder)
        self._layout = read_quantization(read_config(folder))
        self._names = list(self._plain_names())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def read(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.floating[Any]]:
        """Read a weight.

        Args:
            name: Its name in the plain architecture.
            rows: Which rows of a matrix to return; all if not given. Of a float matrix only these
                are read.

        Returns:
            The weight in memory: float32 where it is stored as codes or in bfloat16, else in the
            type it is stored in.

        Raises:
            FolderError: If a matrix lacks a tensor, or its tensors contradict one another.
        """
        module = name.rpartition(".")[0]
        is_weight = name.endswith(".weight")
        if is_weight and self._layout is not None and f"{module}.qweight" in self._files:
            weight = read_quantized(self._files, module, self._layout).dequantize()
        elif f"{name}.{NF4_STATE}" in self._files:
            weight = read_nf4_weight(self._files, module).dequantize()
        else:
            return self._files.floats(name, rows)
        return weight if rows is None else weight[rows]

    def _plain_names(self) -> Iterator[str]:
        for name in self._files:
            module, _, last = name.rpartition(".")
            if self._layout is not None and last in TENSOR_NAMES:
                if last == "qweight":
                    yield f"{module}.weight"
            elif ".weight." not in name:  # else a tensor that bitsandbytes stores beside a weight
                yield name
