"""An ONNX file that is written while it is being described.

Large tensors go to the data file the moment they are known and are then forgotten, so that a
model never is in memory as a whole. The same calls in the same order give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.settings import DATA_FILE, MODEL_FILE

MICROSOFT = "com.microsoft"

_OPSETS = {"": 21, MICROSOFT: 1}
_IR_VERSION = 10
_PAGE_BYTES = 4096
_LINE_BYTES = 64


class GraphWriter:
    """Collects nodes, and writes tensors to the data file as they come."""

    def __init__(self, folder: Path, *, standard: bool = False) -> None:
        """Open the data file.

        Args:
            folder: The folder for model.onnx and its data file.
            standard: Whether the graph holds standard operators only.
        """
        self._opsets = {"": _OPSETS[""]} if standard else _OPSETS
        self._folder = folder
        self._data = (folder / DATA_FILE).open("wb")
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._data.close()

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> ir.Value:
        """Declare an input of the graph.

        Args:
            name: Name of the value.
            dtype: Type of its elements.
            shape: Sizes, or names of sizes that vary.

        Returns:
            The value.
        """
        value = ir.Value(name=name, type=_tensor_type(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def optional_input(self, name: str, default: NDArray[Any]) -> ir.Value:
        """Declare an input that has a value unless a run gives it another.

        Args:
            name: Name of the value.
            default: Value of the input if it is left out.

        Returns:
            The value.
        """
        value = self.constant(name, default)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Declare a float32 output of the graph.

        Args:
            value: The value to return.
            name: Name of the value.
            shape: Sizes, or names of sizes that vary.
        """
        value.name = name
        value.type = _tensor_type(np.float32)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Keep a small tensor in model.onnx itself.

        Args:
            name: Name of the value.
            array: Content of the constant.

        Returns:
            The value.
        """
        return self._initializer(ir.tensor(array, name=name))

    def stored(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Write a tensor to the data file.

        Large ones begin at a page, so that they can be mapped; small ones at a cache line.

        Args:
            name: Name of the value.
            array: Content of the constant.

        Returns:
            The value.
        """
        return self.stored_as(name, array, ir.DataType.from_numpy(array.dtype))

    def stored_as(self, name: str, array: NDArray[Any], dtype: ir.DataType) -> ir.Value:
        """Write a tensor to the data file in a type that numpy may not have.

        Args:
            name: Name of the value.
            array: Its value; of the 4-bit types one number to a byte.
            dtype: Its type in the graph.

        Returns:
            The value.
        """
        content = np.ascontiguousarray(array)
        if dtype in (ir.DataType.INT4, ir.DataType.UINT4):
            codes = content.view(np.uint8).reshape(-1) & np.uint8(15)
            codes = np.pad(codes, (0, len(codes) % 2))
            content = codes[::2] | (codes[1::2] << np.uint8(4))
        alignment = _PAGE_BYTES if content.nbytes >= _PAGE_BYTES else _LINE_BYTES
        self._data.write(bytes(-self._data.tell() % alignment))
        offset = self._data.tell()
        self._data.write(content.data)
        tensor = ir.ExternalTensor(
            DATA_FILE,
            offset,
            content.nbytes,
            dtype,
            name=name,
            shape=ir.Shape(array.shape),
            base_dir=self._folder,
        )
        return self._initializer(tensor)

    def stored_again(
        self, name: str, value: ir.Value, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Declare another tensor over bytes that are in the data file already.

        Args:
            name: Name of the value.
            value: The value that ``stored`` returned for these bytes.
            shape: Its shape, of as many elements; the same as before if not given.

        Returns:
            The value.
        """
        before = value.const_value
        assert isinstance(before, ir.ExternalTensor), f"{value.name} is not in the data file"
        return self._initializer(
            ir.ExternalTensor(
                DATA_FILE,
                before.offset,
                before.length,
                before.dtype,
                name=name,
                shape=before.shape if shape is None else ir.Shape(shape),
                base_dir=self._folder,
            )
        )

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Add a node of one output.

        Args:
            operator: Type of the operator.
            inputs: Inputs of the node; None for an optional input that is left out.
            name: Its name, and its output's.
            domain: Operator set that defines the operator.
            **attributes: What else it is told.

        Returns:
            The output.
        """
        return self.nodes(operator, inputs, name, [name], domain=domain, **attributes)[0]

    def nodes(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> Sequence[ir.Value]:
        """Add a node of several outputs.

        Args:
            operator: Type of the operator.
            inputs: Inputs of the node; None for an optional input that is left out.
            name: Name of the value.
            outputs: Names of what it computes; an empty name for one that nobody reads.
            domain: Operator set that defines the operator.
            **attributes: What else it is told.

        Returns:
            The outputs.
        """
        node = ir.node(
            operator,
            inputs,
            attributes=attributes,
            domain=domain,
            name=name,
            outputs=[ir.Value(name=output) for output in outputs],
        )
        self._nodes.append(node)
        return node.outputs

    def save(self, name: str, properties: Mapping[str, str] | None = None) -> None:
        """Write model.onnx.

        Args:
            name: Name of the graph.
            properties: Metadata of the model for runtimes.
        """
        self._data.flush()
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports=self._opsets,
            name=name,
        )
        model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="mistill")
        model.metadata_props.update(properties or {})
        ir.save(model, self._folder / MODEL_FILE)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._initializers.append(value)
        return value


def _tensor_type(dtype: type[np.generic]) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
