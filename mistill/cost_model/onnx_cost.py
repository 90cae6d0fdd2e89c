"""The bytes that a step of one token reads from memory, which bound its speed (roofline)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mistill.cost_model.products import Form, Kernel

if TYPE_CHECKING:
    import onnx_ir as ir

# These operators read a few rows of a table; all others read their weights completely.
_ROW_READERS = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "GroupQueryAttention": (7, 8),
}
_COSINE = 7
_FLOAT = 1  # onnx.TensorProto.FLOAT
_VIEWS = ("Reshape", "Transpose", "Cast", "Expand", "Squeeze", "Unsqueeze", "Identity")

# For each block of a row, the integer kernels store its scale and the sum of its weights.
_PACKED_BLOCK_BYTES = 8
_INTEGER_LEVEL = 4
_FORMS: dict[int, Form] = {4: "int4", 8: "int8"}

_PROBE_BYTES = 1 << 27
_PROBE_PASSES = 6


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Bytes that one token costs.

    Attributes:
        bytes_per_token: Weights that a step reads, as they are stored. A table that is read a
            row at a time counts one row for each operator that does so.
        packed_bytes_per_token: The same as ONNX Runtime lays them out in memory: for each block
            of codes a float32 scale and a float32 sum, which is 6 bits a weight for codes of 4
            bits in blocks of 32, and 4.5 in blocks of 128.
        cache_bytes_per_position: Keys and values that a step reads for each earlier token.
    """

    bytes_per_token: int
    packed_bytes_per_token: int
    cache_bytes_per_position: int

    def ceiling(self, bytes_per_second: float, depth: int = 0) -> float:
        """Tokens per second that memory allows.

        Args:
            bytes_per_second: Speed of memory.
            depth: Tokens before this one.

        Returns:
            Tokens per second.
        """
        bytes_read = self.packed_bytes_per_token + depth * self.cache_bytes_per_position
        return bytes_per_second / max(bytes_read, 1)


def step_cost(graph: ir.Graph) -> StepCost:
    """Count the bytes of a graph.

    Args:
        graph: The graph; weights are not read.

    Returns:
        The bytes.
    """
    import onnx_ir as ir

    whole: dict[str, tuple[int, int]] = {}
    rows = 0
    for node in graph.all_nodes():
        if is_view(node):
            continue
        for index, value in enumerate(node.inputs):
            tensor = constant(value)
            if tensor is None or tensor.dtype == ir.DataType.INT64:
                continue  # computed values, shapes and indices
            size = _loaded_bytes(value, tensor)
            if index in _ROW_READERS.get(node.op_type, ()):
                rows += size // max(tensor.shape.numpy()[0], 1)
            else:
                stored, packed = whole.get(str(tensor.name), (0, 0))
                whole[str(tensor.name)] = (
                    max(stored, size),
                    max(packed, _packed_bytes(node, index, tensor)),
                )
    return StepCost(
        bytes_per_token=rows + sum(stored for stored, _ in whole.values()),
        packed_bytes_per_token=rows + sum(packed for _, packed in whole.values()),
        cache_bytes_per_position=sum(
            _position_bytes(value) for value in graph.inputs if "past" in str(value.name)
        ),
    )


def product_weights(graph: ir.Graph) -> dict[Kernel, int]:
    """Weights that a step multiplies in 8-bit integers, by the kernel that does it.

    Args:
        graph: The graph; weights are not read.

    Returns:
        Rows times columns of all such products of a kernel.
    """
    weights_of_kernel: dict[Kernel, int] = {}
    for node in graph.all_nodes():
        numbers = {
            name: node.attributes.get_int(name, 0)
            for name in ("accuracy_level", "bits", "block_size", "K", "N")
        }
        if node.op_type != "MatMulNBits" or numbers["accuracy_level"] != _INTEGER_LEVEL:
            continue
        if numbers["bits"] in _FORMS:
            kernel = Kernel(_FORMS[numbers["bits"]], numbers["block_size"])
            weights_of_kernel[kernel] = (
                weights_of_kernel.get(kernel, 0) + numbers["K"] * numbers["N"]
            )
    return weights_of_kernel


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The stored tensor that an input is, also through a change of its shape or type.

    Where an input repeats what is stored, the tensor holds it once; see ``constant_array``.

    Args:
        value: An input of a node, or None.

    Returns:
        The tensor; None if the value is computed, or left out.
    """
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None:
            return None
        if producer.op_type == "Constant":
            attribute = producer.attributes.get("value")
            return None if attribute is None else attribute.as_tensor()
        if not is_view(producer):
            return None
        value = producer.inputs[0]
    return None if value is None else value.const_value


def is_view(node: ir.Node) -> bool:
    """Whether a node only changes the shape or type of its first input, or repeats its columns.

    Args:
        node: A node of a graph.

    Returns:
        False for a Gather of rows that the graph computes, as that of an embedding is.
    """
    if node.op_type == "Gather":
        return len(node.inputs) > 1 and constant(node.inputs[1]) is not None
    return node.op_type in _VIEWS


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """The numbers that an input is, computed from what is stored.

    Args:
        value: An input of a node, or None.

    Returns:
        Its array; None if it depends on an input of the graph, or is left out.
    """
    if value is None:
        return None
    producer = value.producer()
    if value.const_value is not None or producer is None or producer.op_type == "Constant":
        tensor = constant(value)
        return None if tensor is None else tensor.numpy()
    before = [constant_array(each) for each in producer.inputs]
    if any(each is None for each in before):
        return None
    array, *others = (np.asarray(each) for each in before)
    if producer.op_type == "Cast" and producer.attributes.get_int("to", 0) == _FLOAT:
        return array.astype(np.float32)
    if producer.op_type == "Reshape":
        return array.reshape(others[0].tolist())
    if producer.op_type == "Expand":
        return np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(others[0].tolist())))
    if producer.op_type == "Gather":
        return np.take(array, others[0], axis=producer.attributes.get_int("axis", 0))
    return None


@cache
def memory_speed(threads: int) -> float:
    """Bytes that this machine's memory gives in a second; measured once, in a tenth of one.

    Args:
        threads: Threads that read at once.

    Returns:
        Bytes per second, the best of several passes over more than a processor's cache.
    """
    numbers = np.ones(_PROBE_BYTES // 8, np.int64)
    parts = np.array_split(numbers, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PROBE_PASSES):
            start = perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, perf_counter() - start)
    return _PROBE_BYTES / best


def _loaded_bytes(value: ir.Value | None, tensor: ir.TensorProtocol) -> int:
    """Bytes of an input in memory, where the file may hold it narrower, and once for several."""
    if value is None or value.const_value is not None or value.shape is None or value.dtype is None:
        return tensor.nbytes
    sizes = [size for size in value.shape if isinstance(size, int)]
    whole = len(sizes) == len(value.shape)
    return int(math.prod(sizes) * value.dtype.itemsize) if whole else tensor.nbytes


def _packed_bytes(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> int:
    integer = node.attributes.get_int("accuracy_level", 0) == _INTEGER_LEVEL
    if node.op_type != "MatMulNBits" or not integer or index not in (2, 3):
        return _loaded_bytes(node.inputs[index], tensor)
    if index == 3:
        return 0  # zero points are part of the sums
    blocks = -(-node.attributes.get_int("K", 0) // node.attributes.get_int("block_size", 1))
    return node.attributes.get_int("N", 0) * blocks * _PACKED_BLOCK_BYTES


def _position_bytes(value: ir.Value) -> int:
    """Bytes of one position of one buffer of keys or values, for a batch of one."""
    if value.shape is None or value.dtype is None or len(value.shape) != 4:
        return 0
    heads, width = value.shape[1], value.shape[3]
    if not isinstance(width, int):
        width = max((_head_dim(use.node) for use in value.uses()), default=0)
    return int(heads * width * value.dtype.itemsize) if isinstance(heads, int) else 0


def _head_dim(node: ir.Node) -> int:
    """Width of a head, by the rotary table of an attention that does not state it elsewhere."""
    table = constant(node.inputs[_COSINE]) if len(node.inputs) > _COSINE else None
    return 0 if table is None else 2 * int(table.shape.numpy()[-1])
