"""A decoder as an ONNX graph of standard operators, which any runtime can read.

Opset 21 and nothing else: no operator of ONNX Runtime's own. Codes are ``DequantizeLinear`` in
blocks of input columns, which ONNX Runtime makes one product with the ``MatMul`` that follows;
attention, rotary embedding and norms are spelt out. It is slower than the graph of
``export.graph.decoder``, and mistill's own engine does not run it.

    inputs    input_ids (batch_size, sequence), attention_mask (batch_size, total),
              past_key_values.{layer}.{key,value} (batch_size, kv_heads, past, head_dim)
    outputs   logits (batch_size, sequence, vocabulary), present.{layer}.{key,value}

Positions are counted in the mask, so that rows of a batch may be padded on the left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph.writer import GraphWriter
from export.settings import GraphOptions
from export.weights.architecture import EMBEDDING, HEAD, Architecture, rotary_tables
from export.weights.blocks import BlockWeight
from export.weights.folder_weights import FolderWeights, Weight
from mistill.progress import track

_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class _Shared:
    """Values that every layer reads."""

    bias: ir.Value
    cosine: ir.Value
    sine: ir.Value


def write_portable_decoder(
    architecture: Architecture,
    weights: FolderWeights,
    writer: GraphWriter,
    options: GraphOptions,
) -> None:
    """Write the graph and its weights, layer by layer.

    Args:
        architecture: Architecture of the decoder.
        weights: Weights of the decoder.
        writer: Writer of the graph.
        options: Context length and precision of tables.
    """
    _PortableDecoder(architecture, weights, writer, options).write()


class _PortableDecoder:
    def __init__(
        self,
        architecture: Architecture,
        weights: FolderWeights,
        writer: GraphWriter,
        options: GraphOptions,
    ) -> None:
        self.architecture = architecture
        self.weights = weights
        self.writer = writer
        self.options = options
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], ir.Value] = {}

    def write(self) -> None:
        architecture, writer = self.architecture, self.writer
        ids = writer.input("input_ids", np.int64, ["batch_size", "sequence"])
        mask = writer.input("attention_mask", np.int64, ["batch_size", "total"])
        shared = self._shared(ids, mask)
        table = self.weights.table(EMBEDDING, self.options.embedding_bits)
        hidden, rows = self._embedding(ids, table)
        with track("export", architecture.layers, "layers") as progress:
            for layer in range(architecture.layers):
                prefix, name = f"model.layers.{layer}", f"layers.{layer}"
                normed = self._norm(hidden, f"{prefix}.input_layernorm", f"{name}.attention")
                update = self._attention(normed, layer, shared)
                hidden = writer.node("Add", [hidden, update], f"{name}.attended")
                normed = self._norm(hidden, f"{prefix}.post_attention_layernorm", f"{name}.mlp")
                hidden = writer.node("Add", [hidden, self._feed_forward(normed, layer)], name)
                progress.advance()
        normed = self._norm(hidden, "model.norm", "final")
        logits = self._head(normed, rows)
        writer.output(logits, "logits", ["batch_size", "sequence", architecture.vocabulary_size])
        writer.save(architecture.model_type)

    # --- what all layers share --------------------------------------------------------------------

    def _shared(self, ids: ir.Value, mask: ir.Value) -> _Shared:
        writer = self.writer
        sequence = writer.node("Shape", [ids], "sequence", start=1, end=2)
        total = writer.node("Shape", [mask], "total", start=1, end=2)
        past = writer.node("Sub", [total, sequence], "past")
        cosine, sine = rotary_tables(self.architecture.frequencies, self.options.context_length)
        counted = writer.node("CumSum", [mask, self._integer(1)], "counted")
        kept = writer.node("Slice", [counted, past, total, self._integers(1)], "counted.kept")
        before = writer.node("Sub", [kept, self._integer(1)], "positions.unbounded")
        positions = writer.node("Max", [before, self._integer(0)], "positions")
        turned = []
        for name, table in (("cosine", cosine), ("sine", sine)):
            rows = writer.node("Gather", [writer.stored(f"rotary.{name}", table), positions], name)
            turned.append(writer.node("Unsqueeze", [rows, self._integers(1)], f"{name}.heads"))
        return _Shared(self._bias(mask, past, total), *turned)

    def _bias(self, mask: ir.Value, past: ir.Value, total: ir.Value) -> ir.Value:
        """0 where a query sees a key and the lowest number elsewhere, (B, 1, 1, T, total)."""
        writer = self.writer
        zero, one = self._integer(0), self._integer(1)
        end, start = (
            writer.node("Squeeze", [value], f"{value.name}.scalar") for value in (total, past)
        )
        keys = writer.node("Range", [zero, end, one], "keys")
        queries = writer.node("Range", [start, end, one], "queries.flat")
        queries = writer.node("Unsqueeze", [queries, self._integers(1)], "queries")
        visible = writer.node("LessOrEqual", [keys, queries], "seen.causal")
        window = self.architecture.sliding_window
        if window is not None:
            distance = writer.node("Sub", [queries, keys], "distance")
            near = writer.node("Less", [distance, self._integer(window)], "near")
            visible = writer.node("And", [visible, near], "seen.window")
        real = writer.node("Cast", [mask], "mask.bool", to=ir.DataType.BOOL)
        real = writer.node("Unsqueeze", [real, self._integers(1, 2, 3)], "mask.heads")
        visible = writer.node("And", [visible, real], "seen")
        return writer.node("Where", [visible, self._float(0.0), self._float(_LOWEST)], "bias")

    # --- embedding and head -----------------------------------------------------------------------

    def _embedding(self, ids: ir.Value, table: Weight) -> tuple[ir.Value, ir.Value | None]:
        """The residual stream before the first layer, and the float table if it is one."""
        writer = self.writer
        if not isinstance(table, BlockWeight):
            rows = writer.stored("embedding.weight", table)
            return writer.node("Gather", [rows, ids], "embedding", axis=0), rows
        # Gather does not support 4-bit codes, so that each has a byte of its own here.
        codes, zeros = table.steps()
        parts = [
            writer.node("Gather", [writer.stored(f"embedding.{name}", array), ids], name, axis=0)
            for name, array in (
                ("embedding.codes", codes),
                ("embedding.scales", table.scales),
                *([] if zeros is None else [("embedding.zeros", zeros)]),
            )
        ]
        hidden = writer.node(
            "DequantizeLinear", parts, "embedding", axis=2, block_size=table.block_size
        )
        if table.order is not None:
            order = writer.stored("embedding.order", np.argsort(table.order))
            hidden = writer.node("Gather", [hidden, order], "embedding.ordered", axis=-1)
        return hidden, None

    def _head(self, hidden: ir.Value, rows: ir.Value | None) -> ir.Value:
        options, tied = self.options, self.architecture.tied
        if tied and rows is not None and options.head_bits == 32:
            columns = self.writer.node("Transpose", [rows], "head.weight", perm=[1, 0])
            return self.writer.node("MatMul", [hidden, columns], "logits")
        weight = self.weights.table(EMBEDDING if tied else HEAD, options.head_bits)
        return self._multiply(hidden, weight, None, "logits")

    # --- a layer ----------------------------------------------------------------------------------

    def _attention(self, normed: ir.Value, layer: int, shared: _Shared) -> ir.Value:
        architecture, writer = self.architecture, self.writer
        prefix, name = f"model.layers.{layer}.self_attn", f"layers.{layer}.attention"
        width, kv_heads = architecture.head_dim, architecture.kv_heads
        heads: dict[str, ir.Value] = {}
        for part, count in (("q", architecture.heads), ("k", kv_heads), ("v", kv_heads)):
            flat = self._product(normed, f"{prefix}.{part}_proj", f"{name}.{part}")
            shape = self._integers(0, 0, count, width)
            split = writer.node("Reshape", [flat, shape], f"{name}.{part}.split")
            if part != "v" and architecture.head_norms:
                split = self._norm(split, f"{prefix}.{part}_norm", f"{name}.{part}")
            value = writer.node("Transpose", [split], f"{name}.{part}.heads", perm=[0, 2, 1, 3])
            if part != "v" and layer not in architecture.unrotated_layers:
                value = self._rotate(value, shared, f"{name}.{part}")
            heads[part] = value
        cache: list[int | str] = ["batch_size", kv_heads, "past", width]
        for part, tensor in (("k", "key"), ("v", "value")):
            past = writer.input(f"past_key_values.{layer}.{tensor}", np.float32, cache)
            whole = writer.node("Concat", [past, heads[part]], f"present.{layer}.{tensor}", axis=2)
            writer.output(
                whole, f"present.{layer}.{tensor}", ["batch_size", kv_heads, "total", width]
            )
            heads[part] = writer.node("Unsqueeze", [whole, self._integers(2)], f"{name}.{tensor}")
        # Query heads that share a key head are adjacent.
        shape = self._integers(0, kv_heads, architecture.heads // kv_heads, -1, width)
        queries = writer.node("Reshape", [heads["q"], shape], f"{name}.groups")
        queries = writer.node(
            "Mul", [queries, self._float(1 / math.sqrt(width))], f"{name}.queries"
        )
        keys = writer.node("Transpose", [heads["k"]], f"{name}.keys", perm=[0, 1, 2, 4, 3])
        scores = writer.node("MatMul", [queries, keys], f"{name}.scores")
        scores = writer.node("Add", [scores, shared.bias], f"{name}.masked")
        shares = writer.node("Softmax", [scores], f"{name}.shares", axis=-1)
        mixed = writer.node("MatMul", [shares, heads["v"]], f"{name}.mixed")
        shape = self._integers(0, architecture.heads, -1, width)
        mixed = writer.node("Reshape", [mixed, shape], f"{name}.mixed.heads")
        mixed = writer.node("Transpose", [mixed], f"{name}.mixed.positions", perm=[0, 2, 1, 3])
        shape = self._integers(0, 0, architecture.heads * width)
        joined = writer.node("Reshape", [mixed, shape], f"{name}.joined")
        return self._product(joined, f"{prefix}.o_proj", f"layers.{layer}.o")

    def _rotate(self, value: ir.Value, shared: _Shared, name: str) -> ir.Value:
        """Turn each pair of numbers, one from each half of a head, by the angle of its position."""
        writer = self.writer
        names = [f"{name}.first", f"{name}.second"]
        first, second = writer.nodes(
            "Split", [value], f"{name}.halves", names, axis=-1, num_outputs=2
        )
        products = {
            (part, table): writer.node("Mul", [half, angle], f"{name}.{part}.{table}")
            for part, half in (("first", first), ("second", second))
            for table, angle in (("cosine", shared.cosine), ("sine", shared.sine))
        }
        turned = [
            writer.node(
                "Sub",
                [products["first", "cosine"], products["second", "sine"]],
                f"{name}.turned.first",
            ),
            writer.node(
                "Add",
                [products["second", "cosine"], products["first", "sine"]],
                f"{name}.turned.second",
            ),
        ]
        return writer.node("Concat", turned, f"{name}.turned", axis=-1)

    def _feed_forward(self, normed: ir.Value, layer: int) -> ir.Value:
        writer, prefix, name = self.writer, f"model.layers.{layer}.mlp", f"layers.{layer}"
        gate = self._product(normed, f"{prefix}.gate_proj", f"{name}.gate")
        up = self._product(normed, f"{prefix}.up_proj", f"{name}.up")
        share = writer.node("Sigmoid", [gate], f"{name}.sigmoid")
        silu = writer.node("Mul", [gate, share], f"{name}.silu")
        gated = writer.node("Mul", [silu, up], f"{name}.gated")
        return self._product(gated, f"{prefix}.down_proj", f"{name}.down")

    def _norm(self, value: ir.Value, module: str, name: str) -> ir.Value:
        """Divide by the root mean square (Zhang and Sennrich, 2019), and scale."""
        writer = self.writer
        squares = writer.node("Mul", [value, value], f"{name}.squares")
        mean = writer.node("ReduceMean", [squares, self._integers(-1)], f"{name}.mean")
        epsilon = self._float(self.architecture.norm_epsilon)
        safe = writer.node("Add", [mean, epsilon], f"{name}.mean.safe")
        root = writer.node("Sqrt", [safe], f"{name}.root")
        normed = writer.node("Div", [value, root], f"{name}.unscaled")
        scale = writer.stored(f"{module}.weight", self.weights.floats(f"{module}.weight"))
        return writer.node("Mul", [normed, scale], f"{name}.norm")

    # --- products ---------------------------------------------------------------------------------

    def _product(self, value: ir.Value, module: str, name: str) -> ir.Value:
        linear = self.weights.linear(module)
        return self._multiply(value, linear.weight, linear.bias, name)

    def _multiply(
        self, value: ir.Value, weight: Weight, bias: NDArray[np.float32] | None, name: str
    ) -> ir.Value:
        writer = self.writer
        if isinstance(weight, BlockWeight):
            if weight.order is not None:
                order = writer.stored(f"{name}.order", weight.order)
                value = writer.node("Gather", [value, order], f"{name}.ordered", axis=-1)
            matrix = self._dequantize(weight, name)
        else:
            matrix = writer.stored(f"{name}.weight", weight.T)
        product = writer.node(
            "MatMul", [value, matrix], name if bias is None else f"{name}.product"
        )
        if bias is None:
            return product
        return writer.node("Add", [product, writer.stored(f"{name}.bias", bias)], name)

    def _dequantize(self, weight: BlockWeight, name: str) -> ir.Value:
        """The float matrix (K, N) of codes whose scales run along K."""
        writer = self.writer
        steps, zeros = weight.steps()
        # Opset 21 has no 2-bit codes; they are stored as 4-bit codes.
        four, eight = (
            (ir.DataType.INT4, ir.DataType.INT8)
            if zeros is None
            else (ir.DataType.UINT4, ir.DataType.UINT8)
        )
        code_type = eight if weight.bits == 8 else four
        inputs = [
            writer.stored_as(f"{name}.codes", steps.T, code_type),
            writer.stored(f"{name}.scales", weight.scales.T),
        ]
        if zeros is not None:
            inputs.append(writer.stored_as(f"{name}.zeros", zeros.T, code_type))
        return writer.node(
            "DequantizeLinear", inputs, f"{name}.weight", axis=0, block_size=weight.block_size
        )

    # --- constants --------------------------------------------------------------------------------

    def _integer(self, number: int) -> ir.Value:
        return self._constant(np.array(number, np.int64))

    def _integers(self, *numbers: int) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _float(self, number: float) -> ir.Value:
        return self._constant(np.array(number, np.float32))

    def _constant(self, array: NDArray[np.generic]) -> ir.Value:
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            self._constants[key] = self.writer.constant(name, array)
        return self._constants[key]
