"""A graph is written as it is described."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from export.graph.writer import GraphWriter
from mistill.cost_model.onnx_cost import constant_array


def test_a_graph_computes_what_was_described(tmp_path: Path) -> None:
    with GraphWriter(tmp_path) as writer:
        value = writer.input("x", np.float32, ["rows", 2000])
        factor = writer.optional_input("factor", np.array([3], np.float32))
        matrix = writer.stored("matrix", np.arange(4000, dtype=np.float32).reshape(2, 2000).T)
        product = writer.node("MatMul", [value, matrix], "product")
        writer.output(writer.node("Mul", [product, factor], "scaled"), "y", ["rows", 2])
        writer.save("test")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    x = np.zeros((1, 2000), np.float32)
    x[0, 1] = 1
    assert session.run(["y"], {"x": x})[0].tolist() == [[3.0, 6003.0]]
    assert session.run(["y"], {"x": x, "factor": np.array([1], np.float32)})[0].tolist() == [
        [1.0, 2001.0]
    ]


def test_large_tensors_begin_at_a_page_and_small_ones_at_a_line(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "first": np.arange(10, dtype=np.int8),
        "second": np.arange(5000, dtype=np.float32),
        "third": np.arange(3, dtype=np.float32),
    }
    with GraphWriter(tmp_path) as writer:
        values = [writer.stored(name, array) for name, array in arrays.items()]
        writer.output(writer.node("Identity", [values[1]], "copy"), "y", [5000])
        writer.save("test")
    stored = ir.load(tmp_path / "model.onnx").graph.initializers
    data = (tmp_path / "model.onnx.data").read_bytes()
    for name, step in (("first", 64), ("second", 4096), ("third", 64)):
        tensor = stored[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.offset is not None
        assert tensor.offset % step == 0
        content = arrays[name].tobytes()
        assert data[tensor.offset : tensor.offset + len(content)] == content
    assert len(data) < 4096 + 20000 + 64 + 12


def test_two_tensors_over_the_same_bytes_are_stored_once(tmp_path: Path) -> None:
    table = np.arange(6000, dtype=np.float32).reshape(3, 2000)
    with GraphWriter(tmp_path) as writer:
        stored = writer.stored("table", table)
        same = writer.stored_again("same", stored)
        flat = writer.stored_again("flat", stored, [6000])
        for name, value in (("one", same), ("other", flat)):
            shape = value.shape
            assert shape is not None
            writer.output(writer.node("Identity", [value], name), name, list(shape.numpy()))
        writer.save("test")
    assert (tmp_path / "model.onnx.data").stat().st_size == table.nbytes
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    one, other = session.run(["one", "other"], {})
    np.testing.assert_array_equal(one, table)
    np.testing.assert_array_equal(other, table.reshape(-1))


def test_scales_of_earlier_exports_are_known_too(tmp_path: Path) -> None:
    few = np.array([[0.5, 0.25], [3.0, 0.125], [1.0, 2.0]], np.float16)
    with GraphWriter(tmp_path) as writer:
        value = writer.stored("stored", few[..., None])
        value = writer.node("Cast", [value], "wide", to=int(ir.DataType.FLOAT))
        shapes = (writer.constant(f"to.{size}", np.array(size)) for size in ((3, 2, 4), (3, 8)))
        value = writer.node("Expand", [value, next(shapes)], "each")
        value = writer.node("Reshape", [value, next(shapes)], "scales")
        writer.output(writer.node("Neg", [value], "y"), "y", [3, 8])
        writer.save("test")
    graph = ir.load(tmp_path / "model.onnx").graph
    (read,) = [node.inputs[0] for node in graph if node.op_type == "Neg"]
    said = constant_array(read)
    assert said is not None
    assert said.dtype == np.float32
    assert np.array_equal(said, few.repeat(4, axis=1))


HALVES = np.array([[0.5, 0.25, -1.5, 2.0], [3.0, 0.125, 0.0, -4.0]], np.float32)
SMALL = {
    "in float16": (HALVES, 2 * 8),
    "in float16, once for two": (HALVES.repeat(2, axis=1), 2 * 8),
    "in float16, once for sixteen": (HALVES.repeat(16, axis=1), 2 * 8),
    "once for four": (np.float32(0.1) * HALVES.repeat(4, axis=1), 4 * 8),
    "as they are": (np.float32(0.1) * HALVES, 4 * 8),
    "too large for float16": (np.float32(1e5) * HALVES, 4 * 8),
    "alike in one row alone": (np.array([[1, 1], [1, 2]], np.float32), 2 * 4),
    "zero points, once for two": (np.array([[7, 7, 9, 9], [8, 8, 8, 8]], np.uint8), 4),
}


@pytest.mark.parametrize(("array", "size"), SMALL.values(), ids=SMALL)
def test_small_arrays_take_few_bytes_and_are_whole_when_loaded(
    array: NDArray[Any], size: int, tmp_path: Path
) -> None:
    rows, blocks = array.shape
    with GraphWriter(tmp_path) as writer:
        value = writer.stored_small("scales", array, (rows, blocks, 1))
        again = writer.stored_small_again("again", value, array)
        for number, each in enumerate((value, again)):
            wide = writer.node("Cast", [each], f"wide.{number}", to=int(ir.DataType.FLOAT))
            writer.output(wide, f"y.{number}", [rows, blocks, 1][: 3 - number])
        writer.save("test")
    graph = ir.load(tmp_path / "model.onnx").graph
    stored = [value.const_value for value in graph.initializers.values()]
    in_file = {(one.offset, one.length) for one in stored if isinstance(one, ir.ExternalTensor)}
    assert in_file == {(0, size)}
    # Each node takes time when the graph is loaded: one widens, one repeats.
    nodes = Counter(node.op_type for node in graph if not str(node.name).startswith("wide"))
    assert set(nodes) <= {"Cast", "Gather"}
    assert max(nodes.values(), default=0) <= 2
    read = [node.inputs[0] for node in graph if str(node.name).startswith("wide")]
    for one in read:
        said = constant_array(one)
        assert said is not None
        assert np.array_equal(said.reshape(array.shape), array)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    first, second = session.run(None, {})
    assert np.array_equal(first[..., 0], array)
    assert np.array_equal(second, array)
    assert not list(ir.load(tmp_path / "loaded.onnx").graph), "nothing is left to be computed"
