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

# How many neighbouring blocks may share a scale: groups of up to 256 columns in blocks of 16.
_REPETITIONS = (16, 8, 4, 2)


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
        self._columns: dict[tuple[int, int], ir.Value] = {}

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

    def output(
        self,
        value: ir.Value,
        name: str,
        shape: Sequence[int | str],
        dtype: type[np.generic] = np.float32,
    ) -> None:
        """Declare an output of the graph.

        Args:
            value: The value to return.
            name: Name of the value.
            shape: Sizes, or names of sizes that vary.
            dtype: Type of its elements.
        """
        value.name = name
        value.type = _tensor_type(dtype)
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

    def stored_small(
        self, name: str, array: NDArray[Any], shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Write a constant of a row for each output and a column for each block of inputs.

        The file holds numbers that float16 has in float16, and what several neighbouring blocks
        share once. Nodes that read nothing else make the whole array of it, which a runtime
        computes when it loads the graph.

        Args:
            name: Name of the value.
            array: Scales, float32, or zero points, uint8, of shape (N, blocks).
            shape: Its shape in the graph, of as many elements; (N, blocks) if not given.

        Returns:
            The value, in the type of the array.
        """
        few, times = _without_repetition(_narrowed(array))
        few = few.reshape(_stored_shape(few, array, shape))
        if times == 1 and few.dtype == array.dtype:
            return self.stored(name, few)
        return self._widened(name, self.stored(f"{name}.stored", few), array, times)

    def stored_small_again(
        self, name: str, value: ir.Value, array: NDArray[Any], shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Declare what ``stored_small`` wrote again, over the same bytes.

        Args:
            name: Name of the new value.
            value: The value that ``stored_small`` returned for the same array.
            array: As it was given to it.
            shape: Its shape in the graph, of as many elements; (N, blocks) if not given.

        Returns:
            The value.
        """
        few, times = _without_repetition(_narrowed(array))
        sizes = _stored_shape(few, array, shape)
        if times == 1 and few.dtype == array.dtype:
            return self.stored_again(name, value, sizes)
        before: ir.Value | None = value
        while before is not None and before.const_value is None:
            producer = before.producer()
            before = None if producer is None else producer.inputs[0]
        assert before is not None, f"{value.name} was not stored"
        return self._widened(name, self.stored_again(f"{name}.stored", before, sizes), array, times)

    def _widened(self, name: str, value: ir.Value, array: NDArray[Any], times: int) -> ir.Value:
        """What ``stored_small`` promises, of its numbers in the file.

        In as few nodes as there can be: a runtime takes a tenth of a millisecond for each when it
        loads the graph.
        """
        assert value.shape is not None
        rows, few, *rest = value.shape.numpy()
        if value.dtype != ir.DataType.from_numpy(array.dtype):
            wide = name if times == 1 else f"{name}.wide"
            value = self.node("Cast", [value], wide, to=int(ir.DataType.FLOAT))
        if times > 1:
            value = self.node("Gather", [value, self._blocks(few, times)], name, axis=1)
        sizes = (rows, few * times, *rest)
        value.type, value.shape = _tensor_type(array.dtype.type), ir.Shape(sizes)
        return value

    def _blocks(self, few: int, times: int) -> ir.Value:
        """For each block the column that it shares; one constant for all that are so wide."""
        key = few, times
        if key not in self._columns:
            columns = np.repeat(np.arange(few, dtype=np.int64), times)
            self._columns[key] = self.constant(f"columns.{few}x{times}", columns)
        return self._columns[key]

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


def _narrowed(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in float16, where it has all of them."""
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else array


def _without_repetition(array: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """The first of every so many columns that are alike in every row, and how many those are."""
    for times in _REPETITIONS:
        if array.shape[1] % times == 0:
            grouped = array.reshape(len(array), -1, times)
            if bool((grouped == grouped[..., :1]).all()):
                return grouped[..., 0], times
    return array, 1


def _stored_shape(
    few: NDArray[Any], array: NDArray[Any], shape: Sequence[int] | None
) -> tuple[int, ...]:
    """The shape in the file of what becomes an array of a shape, (N, blocks) or (N, blocks, 1)."""
    sizes = tuple(shape or array.shape)
    assert sizes[:2] == array.shape, f"{sizes} has no axis of blocks"
    return (*few.shape, *sizes[2:])


def _tensor_type(dtype: type[np.generic]) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
