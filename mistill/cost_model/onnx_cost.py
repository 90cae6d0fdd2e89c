"""The bytes that a step of one token reads from memory, which bound its speed (roofline)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

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
_VIEWS = ("Reshape", "Transpose", "Cast", "Squeeze", "Unsqueeze", "Identity")

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
        if node.op_type in _VIEWS:
            continue
        for index, value in enumerate(node.inputs):
            tensor = constant(value)
            if tensor is None or tensor.dtype == ir.DataType.INT64:
                continue  # computed values, shapes and indices
            if index in _ROW_READERS.get(node.op_type, ()):
                rows += tensor.nbytes // max(tensor.shape.numpy()[0], 1)
            else:
                stored, packed = whole.get(str(tensor.name), (0, 0))
                whole[str(tensor.name)] = (
                    max(stored, tensor.nbytes),
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
        if producer.op_type not in _VIEWS:
            return None
        value = producer.inputs[0]
    return None if value is None else value.const_value


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


def _packed_bytes(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> int:
    integer = node.attributes.get_int("accuracy_level", 0) == _INTEGER_LEVEL
    if node.op_type != "MatMulNBits" or not integer or index not in (2, 3):
        return tensor.nbytes
    if index == 3:
        return 0  # zero points are part of the sums
    return int(tensor.size) * _PACKED_BLOCK_BYTES


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
