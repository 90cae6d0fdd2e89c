"""The ways in which ONNX Runtime can multiply a matrix, and a stopwatch for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir as ir

Form = Literal["int4", "int8", "dynamic_int8", "float32"]

PROMPT = 512
"""Tokens of the prompt that is timed."""

MOST_WEIGHTS = 1 << 20
"""A larger matrix is timed by some of its rows; time grows with rows."""

_MICROSOFT = "com.microsoft"
_FLUSH_BYTES = 1 << 26
_ROUNDS = {1: 15, PROMPT: 2}


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


KERNELS = (
    *(Kernel("int4", block) for block in (32, 64, 128)),
    *(Kernel("int8", block) for block in (32, 64, 128)),
    Kernel("dynamic_int8"),
    Kernel("float32"),
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a product takes.

    Attributes:
        token: Seconds for one token.
        prompt: Seconds for 512 of them.
    """

    token: float
    prompt: float


Timer = Callable[[Sequence[Kernel], int, int], Mapping[Kernel, Timing]]
"""What times products by a matrix of some rows and columns, with each of several kernels."""


class OnnxTimer:
    """Times products in ONNX Runtime, out of a cold cache, as in a step of a whole model.

    Kernels take turns, so that what else the machine does falls on all of them, and the least
    of the rounds counts.
    """

    def __init__(self, threads: int, clock: Callable[[], float] = perf_counter) -> None:
        """Make a stopwatch.

        Args:
            threads: Threads to multiply with.
            clock: Seconds from some moment on.
        """
        self._threads = threads
        self._clock = clock
        self._flush = np.ones(_FLUSH_BYTES // 8, np.int64)

    def __call__(
        self, kernels: Sequence[Kernel], rows: int, columns: int
    ) -> Mapping[Kernel, Timing]:
        """Time a product with each kernel.

        Args:
            kernels: How to multiply.
            rows: Rows of the matrix, N.
            columns: Columns of the matrix, K.

        Returns:
            The least of several rounds.
        """
        timed = min(rows, max(MOST_WEIGHTS // columns, 64))
        # Of a small matrix several stand side by side, so that a run is more than its beginning.
        copies = max(1, MOST_WEIGHTS // (timed * columns))
        sessions = {kernel: self._open(kernel, timed, columns, copies) for kernel in kernels}
        share = rows / (timed * copies)
        least = {tokens: dict.fromkeys(kernels, float("inf")) for tokens in _ROUNDS}
        for tokens, rounds in _ROUNDS.items():
            feeds = {"x": np.ones((tokens, columns), np.float32)}
            for session in sessions.values():
                session.run(None, feeds)
            for _ in range(rounds):
                for kernel, session in sessions.items():
                    self._flush.max()
                    start = self._clock()
                    session.run(None, feeds)
                    seconds = (self._clock() - start) * share
                    least[tokens][kernel] = min(least[tokens][kernel], seconds)
        return {
            kernel: Timing(token=least[1][kernel], prompt=least[PROMPT][kernel])
            for kernel in kernels
        }

    def _open(self, kernel: Kernel, rows: int, columns: int, copies: int) -> Any:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnx_ir
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # Threads of one session that still wait would take the time of the next one's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = onnx_ir.serde.serialize_model(_model(kernel, rows, columns, copies))
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


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
                name=f"w{copy}.{place}",
                type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
                shape=onnx_ir.Shape(array.shape),
                const_value=onnx_ir.tensor(array, name=f"w{copy}.{place}"),
            )
            for place, array in enumerate(arrays)
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
