"""Matrix products as ONNX Runtime computes them: its kernels, and a small graph to time them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mistill.cost_model.processors import held_to_first_processor, usable_processors

if TYPE_CHECKING:
    import onnx_ir as ir

Form = Literal["int4", "int8", "dynamic_int8", "float32"]

_MICROSOFT = "com.microsoft"
# The difference between two products, of matrices that fit the processor's cache, is free of the
# fixed cost of a run.
ROWS, COLUMNS = (2048, 4096), 1024
_SECONDS = 0.15


@dataclass(frozen=True, order=True)
class Kernel:
    """A way to multiply a matrix.

    Attributes:
        form: ``int4`` and ``int8`` are codes in blocks, with activations rounded block by block;
            ``dynamic_int8`` has one scale for a row of weights and one for all activations;
            ``float32`` rounds nothing.
        block: Columns that share a scale; 0 where a whole row does, or none.
    """

    form: Form
    block: int = 0

    def __str__(self) -> str:
        """The kernel in a word or two."""
        return f"{self.form.replace('_', ' ')}{f' in {self.block}' if self.block else ''}"


def open_products(
    kernel: Kernel, rows: int, columns: int, *, threads: int, copies: int = 1, alone: bool = True
) -> Any:
    """A session that multiplies its input ``x``, (tokens, columns), with matrices made up.

    Its threads keep to processors of their own, and leave the first one to whoever runs it
    within ``held_to_first_processor``.

    Args:
        kernel: Kernel of the product.
        rows: Rows of a matrix, N.
        columns: Columns of a matrix, K.
        threads: Threads to multiply with.
        copies: Matrices, all different in memory.
        alone: Whether no other session runs meanwhile: else its threads do not wait for work by
            spinning, which would take the time of the others.

    Returns:
        An ``onnxruntime.InferenceSession``.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnx_ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    processors = usable_processors()
    if 1 < threads <= len(processors):
        others = ";".join(str(one + 1) for one in processors[1:threads])
        options.add_session_config_entry("session.intra_op_thread_affinities", others)
    if not alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    model = onnx_ir.serde.serialize_model(_model(kernel, rows, columns, copies))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@cache
def kernel_speed(kernel: Kernel, threads: int) -> float:
    """How fast a kernel multiplies one token if memory bandwidth is no limit.

    Args:
        kernel: Kernel to time.
        threads: Threads to multiply with.

    Returns:
        Weights per second, from matrices that a cache holds; measured once, in a third of a second.
    """
    few, many = (_least_seconds(kernel, rows, threads) for rows in ROWS)
    return weights_per_second(few, many)


def weights_per_second(few_rows_seconds: float, many_rows_seconds: float) -> float:
    """The speed of a kernel without the fixed cost of a run.

    Args:
        few_rows_seconds: Time of a run with the smaller matrix of ``ROWS``.
        many_rows_seconds: Time of a run with the larger one.

    Returns:
        Weights per second.
    """
    few, many = ROWS
    if many_rows_seconds > few_rows_seconds:
        return (many - few) * COLUMNS / (many_rows_seconds - few_rows_seconds)
    # A disturbed clock found the larger matrix no slower; its own time then bounds the speed.
    return many * COLUMNS / many_rows_seconds


def _least_seconds(kernel: Kernel, rows: int, threads: int) -> float:
    session = open_products(kernel, rows, COLUMNS, threads=threads)
    feeds = {"x": np.ones((1, COLUMNS), np.float32)}
    end, least = perf_counter() + _SECONDS, float("inf")
    with held_to_first_processor():
        for start in takewhile(lambda now: now < end, iter(perf_counter, None)):
            session.run(None, feeds)
            least = min(least, perf_counter() - start)
    return least


def _product(
    kernel: Kernel, rows: int, columns: int
) -> tuple[str, list[NDArray[Any]], dict[str, Any]]:
    """The operator of a kernel, its weights and its attributes."""
    numbers = np.random.default_rng(0)
    if kernel.form == "float32":
        return "MatMul", [numbers.standard_normal((columns, rows), np.float32)], {}
    if kernel.form == "dynamic_int8":
        codes = numbers.integers(-64, 64, (columns, rows)).astype(np.int8)
        return "DynamicQuantizeMatMul", [codes, np.full(rows, 0.01, np.float32)], {}
    bits = 4 if kernel.form == "int4" else 8
    blocks = -(-columns // kernel.block)
    codes = numbers.integers(0, 256, (rows, blocks, kernel.block * bits // 8), np.uint8)
    attributes = {"bits": bits, "block_size": kernel.block, "K": columns, "N": rows}
    weights: list[NDArray[Any]] = [codes, np.full((rows, blocks), 0.01, np.float32)]
    return "MatMulNBits", weights, {**attributes, "accuracy_level": 4}


def _model(kernel: Kernel, rows: int, columns: int, copies: int) -> ir.Model:
    """Products of one input and several matrices."""
    import onnx_ir

    floats = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    value = onnx_ir.Value(name="x", type=floats, shape=onnx_ir.Shape(["tokens", columns]))
    operator, arrays, attributes = _product(kernel, rows, columns)
    stored, nodes, results = [], [], []
    for copy in range(copies):
        weights = [
            onnx_ir.Value(
                name=f"w{copy}.{index}",
                type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
                shape=onnx_ir.Shape(array.shape),
                const_value=onnx_ir.tensor(array, name=f"w{copy}.{index}"),
            )
            for index, array in enumerate(arrays)
        ]
        stored += weights
        result = onnx_ir.Value(name=f"y{copy}", type=floats, shape=onnx_ir.Shape(["tokens", rows]))
        results.append(result)
        nodes.append(
            onnx_ir.node(
                operator,
                [value, *weights],
                attributes=attributes,
                domain="" if operator == "MatMul" else _MICROSOFT,
                outputs=[result],
            )
        )
    graph = onnx_ir.Graph(
        [value],
        results,
        nodes=nodes,
        initializers=stored,
        opset_imports={"": 21, _MICROSOFT: 1},
        name="products",
    )
    return onnx_ir.Model(graph, ir_version=10)
