"""A check that the graph's data file holds the codes of the source.

Bytes on disk are compared with bytes on disk. The packed codes of the source are unpacked here by
other code than the export's, and nothing that the export had in memory is used. If the graph has
its columns or rows in another order, that order is read from the graph or from the source's
``g_idx``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.graph.outliers import FACTOR
from export.settings import MODEL_FILE
from export.weights.architecture import EMBEDDING, HEAD, Architecture
from mistill.cost_model.onnx_cost import constant, constant_array
from mistill.errors import ExportError
from mistill.folders.folder import read_config
from mistill.weights.gptq_layout import GptqFormat, read_quantization
from mistill.weights.tensor_files import TensorFiles

if TYPE_CHECKING:
    import onnx_ir as ir

_ROWS_AT_ONCE = 1024
_NF4_STATE = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, kw_only=True)
class CodeCheck:
    """Numbers of matrices, codes and scales that are equal to the source's.

    Attributes:
        matrices: Matrices compared.
        codes: Codes compared, all equal to the source's.
        scales: Scales and zero points compared; none of NF4, whose scales are rounded into the
            8-bit grid.
        decoded: Names of matrices that the source stores as codes and the graph as floats, as the
            settings request.
    """

    matrices: int
    codes: int
    scales: int
    decoded: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Stored:
    """Codes as the graph stores them, of a node or of some of its rows."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None
    bits: int
    columns: int
    order: NDArray[np.int64] | None

    def rows(self, start: int, end: int) -> _Stored:
        return _Stored(
            self.codes[start:end],
            self.scales[start:end],
            None if self.zeros is None else self.zeros[start:end],
            self.bits,
            self.columns,
            self.order,
        )

    def expanded(self) -> NDArray[np.uint8]:
        return _lanes(self.codes.reshape(len(self.codes), -1), self.bits)[:, : self.columns]


def check_codes(folder: Path, source: Path, architecture: Architecture) -> CodeCheck | None:
    """Compare every code, scale and zero of a graph with the source's.

    Args:
        folder: The folder of the graph.
        source: The GPTQ or NF4 folder that it was exported from.
        architecture: Architecture of the decoder.

    Returns:
        The numbers compared; None if the source holds no codes.

    Raises:
        ExportError: If anything differs, or the graph lacks a matrix that the source holds as
            codes; the message names it.
    """
    import onnx_ir

    gptq_format = read_quantization(read_config(source))
    files = TensorFiles(source)
    nodes = {str(node.name): node for node in onnx_ir.load(folder / MODEL_FILE).graph}
    matrices = codes = scales = 0
    decoded: list[str] = []
    for product, modules_of_product in _places(architecture):
        if not any(_has_codes(files, module) for module in modules_of_product):
            continue
        for name, modules in _products(nodes, product, modules_of_product):
            rows = _row_order(files, nodes, modules)
            node = nodes.get(name)
            if node is None:
                raise ExportError(
                    f"the graph has no node {name}, where the codes of {modules[0]} belong; "
                    "nothing was written: this is a fault of the export"
                )
            stored, start = _read(node), 0
            for module in modules:
                if stored is None:
                    decoded += [module] if _has_codes(files, module) else []
                    continue
                count, columns = architecture.shapes()[module]
                part = replace(stored.rows(start, start + count), columns=columns)
                start += count
                if f"{module}.qweight" in files and gptq_format is not None:
                    scales += _compare_gptq(part, files, module, gptq_format, rows)
                elif _has_codes(files, module):
                    _compare_nf4(part, files, module, rows)
                else:
                    continue
                matrices, codes = matrices + 1, codes + len(part.codes) * part.columns
            _require(stored is None or start == len(stored.codes), modules[-1], "rows")
    if not matrices and not decoded:
        return None
    return CodeCheck(matrices=matrices, codes=codes, scales=scales, decoded=tuple(decoded))


def check_outliers(folder: Path, source: Path) -> None:
    """Compare the float columns of each product with its codes, and with the norm before it.

    The float product must add exactly what dividing the gain of the norm removed.

    Args:
        folder: The folder of the graph.
        source: The folder that it was exported from.

    Raises:
        ExportError: If a product lacks or adds anything; the message names it.
    """
    import onnx_ir

    files = TensorFiles(source)
    nodes = {str(node.name): node for node in onnx_ir.load(folder / MODEL_FILE).graph}
    for name, node in nodes.items():
        norm = _norm_of(node) if node.op_type == "MatMulNBits" else None
        stored = None if norm is None else _read(node)
        if norm is None or stored is None:
            continue
        gain = next(value for value in reversed(norm.inputs) if value is not None)
        gains = _array(constant(gain))
        original = files.floats(str(gain.name)).astype(np.float32).astype(gains.dtype)
        float_product = nodes.get(f"{name}.outliers")
        columns = None if float_product is None else _column_order(float_product)
        if float_product is None or columns is None:
            _require(np.array_equal(gains, original), name, "gains before the codes")
            continue
        divided = original.copy()
        divided[columns] /= FACTOR
        _require(np.array_equal(gains, divided), name, "gains before the codes")
        positions = columns if stored.order is None else np.argsort(stored.order)[columns]
        blocks = positions // (stored.codes.shape[2] * 8 // stored.bits)
        steps = stored.expanded()[:, positions].astype(np.float32)
        steps -= 1 << (stored.bits - 1) if stored.zeros is None else stored.zeros[:, blocks]
        expected = steps * stored.scales[:, blocks] * np.float32(FACTOR - 1)
        weight = _array(constant(float_product.inputs[1]))
        _require(np.array_equal(weight.T, expected), name, "columns in float32")


def _norm_of(node: ir.Node) -> ir.Node | None:
    """The norm whose output a product reads, also in another order of columns."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type == "Gather":
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    is_norm = producer is not None and producer.op_type.endswith("SimplifiedLayerNormalization")
    return producer if is_norm else None


def _has_codes(files: TensorFiles, module: str) -> bool:
    return f"{module}.qweight" in files or f"{module}.weight.{_NF4_STATE}" in files


def _places(architecture: Architecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The name of each product, and the modules whose rows are stacked in it."""
    for layer in range(architecture.layers):
        prefix, short = f"model.layers.{layer}", f"layers.{layer}"
        groups = {
            "qkv": [f"{prefix}.self_attn.{part}_proj" for part in "qkv"],
            "o": [f"{prefix}.self_attn.o_proj"],
            "gate_up": [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up")],
            "down": [f"{prefix}.mlp.down_proj"],
        }
        for name, modules in groups.items():
            yield f"{short}.{name}", tuple(modules)
    yield "embedding", (EMBEDDING,)
    yield "logits", (EMBEDDING if architecture.tied else HEAD,)


def _products(
    nodes: dict[str, ir.Node], product: str, modules: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of the nodes that a product consists of, and their modules."""
    joins = product in nodes and nodes[product].op_type == "Concat"
    if joins and len(modules) > 1:
        yield from ((f"{product}.{number}", (module,)) for number, module in enumerate(modules))
    elif f"{product}.blocks" in nodes:
        yield f"{product}.blocks", modules
    else:
        yield product, modules


def _read(node: ir.Node) -> _Stored | None:
    """The codes of a node; None if it multiplies floats or joins other nodes."""
    gathers = node.op_type == "GatherBlockQuantized"
    if node.op_type != "MatMulNBits" and not gathers:
        return None
    positions = (0, 2, 3) if gathers else (1, 2, 3)
    codes, scales, zeros = (
        constant_array(node.inputs[position]) if position < len(node.inputs) else None
        for position in positions
    )
    assert codes is not None
    assert scales is not None
    bits = node.attributes.get_int("bits")
    scales = scales.reshape(len(codes), -1)
    zeros = None if zeros is None else zeros.reshape(len(codes), -1)
    if zeros is not None and not gathers:
        zeros = _lanes(zeros, bits)[:, : scales.shape[1]]
    columns = node.attributes.get_int("K", codes.shape[1] * codes.shape[2] * 8 // bits)
    order = _order_undone(node) if gathers else _column_order(node)
    return _Stored(codes, scales, zeros, bits, columns, order)


def _column_order(node: ir.Node) -> NDArray[np.int64] | None:
    """The source's column at each position, as the graph gathers its input."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "Gather":
        return None
    order = constant(producer.inputs[1])
    last = producer.attributes.get_int("axis", 0) == -1
    return None if order is None or not last else _array(order).astype(np.int64)


def _order_undone(node: ir.Node) -> NDArray[np.int64] | None:
    """The source's column at each position of a table, as the graph restores their order."""
    while True:
        uses = node.outputs[0].uses()
        following = [use.node for use in uses if use.node.op_type in ("Reshape", "Slice", "Gather")]
        if not following:
            return None
        (node,) = following
        if node.op_type == "Gather":
            positions = constant(node.inputs[1])
            return None if positions is None else np.argsort(_array(positions))


def _row_order(
    files: TensorFiles, nodes: dict[str, ir.Node], modules: tuple[str, ...]
) -> NDArray[np.int64] | None:
    """The order of the rows of gate and up that makes a gather before down unnecessary."""
    prefix, _, name = modules[0].rpartition(".")
    if name not in ("gate_proj", "up_proj", "down_proj"):
        return None
    number = prefix.split(".")[2]
    down = nodes.get(f"layers.{number}.down")
    index = f"{prefix}.down_proj.g_idx"
    if down is None or down.op_type != "MatMulNBits" or index not in files:
        return None
    groups = np.array(files.raw(index))
    if bool((np.diff(groups) >= 0).all()) or _column_order(down) is not None:
        return None
    return np.argsort(groups, kind="stable")


def _compare_gptq(
    stored: _Stored,
    files: TensorFiles,
    module: str,
    gptq_format: GptqFormat,
    rows: NDArray[np.int64] | None,
) -> int:
    """Compare a matrix of GPTQ codes, and return its number of scales."""
    module_format = gptq_format.format_of(module)
    assert module_format is not None  # the folder was read, so its config.json knows the matrix
    scales = files.floats(f"{module}.scales").astype(np.float32)
    count, columns = scales.shape[1], stored.columns
    words = np.array(files.raw(f"{module}.qweight")).view("<u4")
    packed = np.ascontiguousarray(words.T).view(np.uint8)
    order, row_order = stored.order, None
    if module.endswith("down_proj"):
        order = rows if order is None else order
    else:
        row_order = rows
    # Codes of fewer bits that are stored in 8 keep their distance from the middle of the range.
    shift = np.uint8(128 - (1 << (module_format.bits - 1)) if stored.bits == 8 else 0)
    if order is None and row_order is None and stored.bits == module_format.bits:
        width = packed.shape[1]
        same = np.array_equal(stored.codes.reshape(count, -1)[:, :width], packed)
        _require(same, module, "codes")
    else:
        source_rows = np.arange(count) if row_order is None else row_order
        for start in range(0, count, _ROWS_AT_ONCE):
            end = min(start + _ROWS_AT_ONCE, count)
            expected = _lanes(packed[source_rows[start:end]], module_format.bits)[:, :columns]
            expected = (expected if order is None else expected[:, order]) + shift
            _require(np.array_equal(stored.rows(start, end).expanded(), expected), module, "codes")
    groups = _groups(files, module, columns, module_format.group_size)
    groups = groups if order is None else groups[order]
    block = stored.codes.shape[2] * 8 // stored.bits
    firsts = groups[::block]
    _require(np.array_equal(firsts.repeat(block)[:columns], groups), module, "groups")
    expected_scales = scales.T[:, firsts]
    zeros = _zeros(files, module, module_format.bits, gptq_format)[:, :count].T[:, firsts]
    if row_order is not None:
        expected_scales, zeros = expected_scales[row_order], zeros[row_order]
    # A graph of float16 activations has float16 scales.
    expected_scales = expected_scales.astype(stored.scales.dtype)
    _require(np.array_equal(stored.scales, expected_scales), module, "scales")
    zeros = zeros + shift
    middle = np.full(zeros.shape, 1 << (stored.bits - 1), np.uint8)
    graph_zeros = middle if stored.zeros is None else stored.zeros
    _require(np.array_equal(graph_zeros, zeros), module, "zeros")
    return int(scales.size)


def _groups(
    files: TensorFiles, module: str, columns: int, group_size: int
) -> NDArray[np.integer[Any]]:
    if f"{module}.g_idx" in files:
        return np.array(files.raw(f"{module}.g_idx"))
    return np.arange(columns) // (columns if group_size == -1 else group_size)


def _zeros(
    files: TensorFiles, module: str, bits: int, gptq_format: GptqFormat
) -> NDArray[np.uint8]:
    """Zero points of a matrix, shape (G, N or a few more)."""
    words = np.ascontiguousarray(files.raw(f"{module}.qzeros")).view("<u4")
    if gptq_format.checkpoint_format != "gptq":
        return _lanes(words.view(np.uint8), bits)
    if bits == 3:
        return _lanes(words.view(np.uint8), 3) + np.uint8(1) & np.uint8(7)
    # The format subtracts 1 from whole words, so that a zero point of 0 borrows from the next one.
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return _lanes((words + np.uint32(ones)).view(np.uint8), bits)


def _compare_nf4(
    stored: _Stored, files: TensorFiles, module: str, rows: NDArray[np.int64] | None
) -> None:
    """Compare a matrix of NF4 codes: each code of the grid stands for the nearest level."""
    levels = np.asarray(files.floats(f"{module}.weight.quant_map"), np.float64)
    steps = np.arange(256) - 128.0
    scale = np.abs(steps[np.unique(stored.codes)]).max() or 1.0
    level_of = np.abs(steps[:, None] / scale - levels).argmin(axis=1).astype(np.uint8)
    # The same bytes, whichever type of number they are stored as.
    packed = np.array(files.raw(f"{module}.weight")).reshape(-1).view(np.uint8)
    expected = np.stack([packed >> 4, packed & 15], axis=-1).reshape(len(stored.codes), -1)
    expected = expected if rows is None else expected[rows]
    _require(np.array_equal(level_of[stored.expanded()], expected), module, "levels")


def _lanes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unpack codes along the last axis, lowest bits first, one per byte."""
    if bits == 8:
        return packed
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    whole_codes = stream.shape[-1] // bits * bits
    each = stream[..., :whole_codes].reshape(*packed.shape[:-1], -1, bits)
    return np.packbits(each, axis=-1, bitorder="little")[..., 0]


def _array(tensor: ir.TensorProtocol | None) -> NDArray[Any]:
    assert tensor is not None
    return tensor.numpy()


def _require(same: bool, module: str, part: str) -> None:
    if not same:
        raise ExportError(
            f"the {part} of {module} in the graph are not those of the source; nothing was "
            "written: this is a fault of the export"
        )
