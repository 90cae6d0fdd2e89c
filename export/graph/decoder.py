"""A decoder of the Llama family as an ONNX graph that ONNX Runtime runs fast on a CPU.

One layer is nine nodes:

    q, k and v in one product -> GroupQueryAttention (rotary embedding and cache inside) -> o
    -> SkipSimplifiedLayerNormalization -> gate and up in one product -> silu(gate) * up -> down
    -> SkipSimplifiedLayerNormalization

Products are ``MatMul`` for float weights and ``MatMulNBits`` for codes; beside the latter a few
columns may be multiplied in float32 (see ``export.graph.outliers``). What follows the last
attention is computed for the positions from ``first_logit`` on only, by default the last one.

    inputs    input_ids (batch_size, sequence), attention_mask (batch_size, total),
              past_key_values.{layer}.{key,value} (batch_size, kv_heads, past, head_dim),
              first_logit (1,), which may be left out
    outputs   logits (batch_size, kept, vocabulary), present.{layer}.{key,value}

It is one file because the layer is one picture: each function writes a part of the nodes above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph.outliers import FACTOR, Outliers
from export.graph.writer import MICROSOFT, GraphWriter
from export.settings import GraphOptions
from export.weights.architecture import EMBEDDING, HEAD, Architecture, rotary_tables
from export.weights.blocks import BlockWeight, can_stack, stack
from export.weights.folder_weights import FolderWeights, Linear, Weight
from mistill.errors import ExportError
from mistill.progress import track

_ALL = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Shared:
    """Values that every layer reads."""

    last_positions: ir.Value
    total_length: ir.Value
    cosine: ir.Value
    sine: ir.Value


@dataclass(frozen=True)
class _Table:
    """The embedding as initializers, whose bytes a tied head reads too."""

    rows: ir.Value
    scales: ir.Value | None
    blocks: BlockWeight | None


def write_decoder(
    architecture: Architecture,
    weights: FolderWeights,
    writer: GraphWriter,
    options: GraphOptions,
    outliers: Outliers | None = None,
) -> None:
    """Write the graph and its weights, layer by layer.

    Args:
        architecture: Architecture of the decoder.
        weights: Weights of the decoder.
        writer: Writer of the graph.
        options: Context length and precision of tables.
        outliers: Columns that are multiplied in float32; none if not given.
    """
    _Decoder(architecture, weights, writer, options, outliers or {}).write()


class _Decoder:
    def __init__(
        self,
        architecture: Architecture,
        weights: FolderWeights,
        writer: GraphWriter,
        options: GraphOptions,
        outliers: Outliers,
    ) -> None:
        self.architecture = architecture
        self.weights = weights
        self.writer = writer
        self.options = options
        self.outliers = outliers
        # Activations, float weights, scales and the KV cache have one type, as the operators ask.
        self.real: type[np.generic] = np.dtype(options.activations).type
        self._gathered: dict[tuple[ir.Value, bytes], ir.Value] = {}
        # Outputs of norms that divide some columns, and those columns.
        self._divided: dict[ir.Value, NDArray[np.int64]] = {}

    def write(self) -> None:
        from mistill.engine.key_value_cache import WINDOW_PROPERTY

        architecture, writer = self.architecture, self.writer
        ids = writer.input("input_ids", np.int64, ["batch_size", "sequence"])
        mask = writer.input("attention_mask", np.int64, ["batch_size", "total"])
        shared = self._shared(mask)
        hidden, table = self._embedding(ids)
        normed = writer.node(
            "SimplifiedLayerNormalization",
            [hidden, self._norm("model.layers.0.input_layernorm")],
            "layers.0.attention.norm",
            epsilon=architecture.norm_epsilon,
            axis=-1,
        )
        self._remember(normed, "model.layers.0.input_layernorm")
        with track("export", architecture.layers, "layers") as progress:
            for layer in range(architecture.layers):
                prefix = f"model.layers.{layer}"
                attended = self._attention(normed, layer, shared)
                if layer == architecture.layers - 1:
                    first_logit = writer.optional_input("first_logit", np.array([-1], np.int64))
                    hidden, attended = self._keep([hidden, attended], first_logit)
                output = self._product(
                    attended, [f"{prefix}.self_attn.o_proj"], f"layers.{layer}.o"
                )
                normed, hidden = self._add_and_norm(
                    hidden, output, f"{prefix}.post_attention_layernorm", f"layers.{layer}.mlp"
                )
                output = self._feed_forward(normed, layer)
                following = (
                    f"model.layers.{layer + 1}.input_layernorm"
                    if layer + 1 < architecture.layers
                    else "model.norm"
                )
                normed, hidden = self._add_and_norm(
                    hidden, output, following, f"layers.{layer + 1}.attention"
                )
                progress.advance()
        logits = self._head(normed, table)
        if self.real != np.float32:
            logits.name = f"logits.{self.options.activations}"
            logits = writer.node("Cast", [logits], "logits.wide", to=ir.DataType.FLOAT)
        # One position, the default: onnxruntime-genai reads the number from this shape.
        writer.output(logits, "logits", ["batch_size", 1, architecture.vocabulary_size])
        writer.save(
            architecture.model_type,
            {WINDOW_PROPERTY: str(architecture.sliding_window)} if self.options.ring else {},
        )

    def _shared(self, mask: ir.Value) -> _Shared:
        writer = self.writer
        one = writer.constant("one", np.array([1], np.int64))
        lengths = writer.node("ReduceSum", [mask, one], "lengths", keepdims=0)
        last = writer.node("Sub", [lengths, one], "last_positions.int64")
        shape = writer.node("Shape", [mask], "total_length.shape", start=1, end=2)
        total = writer.node("Squeeze", [shape], "total_length.int64")
        cosine, sine = rotary_tables(self.architecture.frequencies, self.options.context_length)
        return _Shared(
            last_positions=writer.node("Cast", [last], "last_positions", to=ir.DataType.INT32),
            total_length=writer.node("Cast", [total], "total_length", to=ir.DataType.INT32),
            cosine=self._stored("rotary.cosine", cosine),
            sine=self._stored("rotary.sine", sine),
        )

    # --- embedding and head ---------------------------------------------------------------------

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, _Table]:
        """The residual stream before the first layer, and the table that a tied head may share."""
        weight = self.weights.table(EMBEDDING, self.options.embedding_bits)
        writer = self.writer
        if not isinstance(weight, BlockWeight):
            table = self._stored("embedding.weight", weight)
            return writer.node("Gather", [table, ids], "embedding", axis=0), _Table(
                table, None, None
            )
        # The table has one axis for blocks and one for the columns of a block, as MatMulNBits
        # needs it, because a tied head reads the same bytes of the file.
        table = writer.stored("embedding.codes", weight.codes)
        scales = writer.stored_small(
            "embedding.scales", self._real(weight.scales), (*weight.scales.shape, 1)
        )
        inputs = [table, ids, scales]
        if weight.zeros is not None:
            # Each block has an axis of its own, so that each zero point has a byte of its own.
            zeros = writer.stored_small("embedding.zeros", weight.zeros, (*weight.zeros.shape, 1))
            inputs.append(zeros)
        gathered = writer.node(
            "GatherBlockQuantized",
            inputs,
            "embedding.blocks",
            domain=MICROSOFT,
            bits=weight.bits,
            block_size=weight.block_size,
            gather_axis=0,
            quantize_axis=2,
        )
        padded = weight.codes.shape[1] * weight.block_size
        shape = writer.constant("embedding.shape", np.array([0, 0, padded], np.int64))
        hidden = writer.node("Reshape", [gathered, shape], "embedding")
        if padded > weight.columns:
            hidden = self._slice(hidden, 0, weight.columns, 2, "embedding.unpadded")
        if weight.order is not None:
            hidden = self._gather_columns(hidden, np.argsort(weight.order), "embedding")
        return hidden, _Table(table, scales, weight)

    def _head(self, hidden: ir.Value, table: _Table) -> ir.Value:
        options = self.options
        if not self.architecture.tied:
            return self._multiply(
                hidden, self.weights.table(HEAD, options.head_bits), None, "logits"
            )
        if options.head_bits != options.embedding_bits:
            weight = self.weights.table(EMBEDDING, options.head_bits)
            return self._multiply(hidden, weight, None, "logits")
        # The head has initializers of its own over the same bytes. ONNX Runtime packs and releases
        # those of the head, and reads only the rows of the embedding that are looked up.
        # One initializer for both would stay in memory as a whole, beside the packed copy.
        if table.blocks is None or table.scales is None:
            rows = self.writer.stored_again("logits.weight", table.rows)
            return self.writer.node(
                "FusedMatMul", [hidden, rows], "logits", domain=MICROSOFT, transB=1
            )
        codes = self.writer.stored_again("logits.codes", table.rows)
        scales = self.writer.stored_small_again(
            "logits.scales", table.scales, self._real(table.blocks.scales)
        )
        return self._multiply_blocks(hidden, table.blocks, codes, scales, None, "logits")

    # --- a layer ----------------------------------------------------------------------------------

    def _attention(self, normed: ir.Value, layer: int, shared: _Shared) -> ir.Value:
        architecture, writer = self.architecture, self.writer
        prefix = f"model.layers.{layer}.self_attn"
        names = [f"{prefix}.{part}_proj" for part in ("q", "k", "v")]
        packed = self._product(normed, names, f"layers.{layer}.qkv")
        parts: list[ir.Value | None] = [packed, None, None]
        if architecture.head_norms:
            parts = [*self._normed_heads(packed, layer)]
        rotated = layer not in architecture.unrotated_layers
        cache: list[int | str] = [
            "batch_size",
            architecture.kv_heads,
            "past",
            architecture.head_dim,
        ]
        past = [
            writer.input(f"past_key_values.{layer}.{part}", self.real, cache)
            for part in ("key", "value")
        ]
        attended, *present = writer.nodes(
            "GroupQueryAttention",
            [
                *parts,
                *past,
                shared.last_positions,
                shared.total_length,
                *([shared.cosine, shared.sine] if rotated else []),
            ],
            f"layers.{layer}.attention",
            [
                f"layers.{layer}.attention",
                *(f"present.{layer}.{part}" for part in ("key", "value")),
            ],
            domain=MICROSOFT,
            num_heads=architecture.heads,
            kv_num_heads=architecture.kv_heads,
            scale=1 / math.sqrt(architecture.head_dim),
            do_rotary=int(rotated),
            local_window_size=architecture.sliding_window or -1,
            **({"sliding_window_cache": 1} if self.options.ring else {}),
        )
        for value in present:
            assert value.name is not None
            cache = ["batch_size", architecture.kv_heads, "total", architecture.head_dim]
            writer.output(value, value.name, cache, self.real)
        return attended

    def _normed_heads(self, packed: ir.Value, layer: int) -> list[ir.Value]:
        """Queries and keys divided by the root mean square of each head, and the values."""
        architecture, writer = self.architecture, self.writer
        name, width = f"layers.{layer}", architecture.head_dim
        heads = {"q": architecture.heads, "k": architecture.kv_heads, "v": architecture.kv_heads}
        sizes = np.array([count * width for count in heads.values()], np.int64)
        flat = writer.nodes(
            "Split",
            [packed, writer.constant(f"{name}.heads.sizes", sizes)],
            f"{name}.heads",
            [f"{name}.{part}" for part in heads],
            axis=-1,
        )
        normed_heads = []
        for value, (part, count) in zip(flat[:2], heads.items(), strict=False):
            shape = writer.constant(
                f"{name}.{part}.shape", np.array([0, 0, count, width], np.int64)
            )
            split = writer.node("Reshape", [value, shape], f"{name}.{part}.split")
            normed = writer.node(
                "SimplifiedLayerNormalization",
                [split, self._norm(f"model.layers.{layer}.self_attn.{part}_norm")],
                f"{name}.{part}.norm",
                epsilon=architecture.norm_epsilon,
                axis=-1,
            )
            shape = writer.constant(
                f"{name}.{part}.joined.shape", np.array([0, 0, count * width], np.int64)
            )
            normed_heads.append(writer.node("Reshape", [normed, shape], f"{name}.{part}.joined"))
        return [*normed_heads, flat[2]]

    def _feed_forward(self, normed: ir.Value, layer: int) -> ir.Value:
        writer, prefix = self.writer, f"model.layers.{layer}.mlp"
        gate = self.weights.linear(f"{prefix}.gate_proj")
        up = self.weights.linear(f"{prefix}.up_proj")
        down = self.weights.linear(f"{prefix}.down_proj")
        if isinstance(down.weight, BlockWeight) and down.weight.order is not None:
            # The rows of gate and up get the order of the columns of down.
            order = down.weight.order
            gate, up = _take_rows(gate, order), _take_rows(up, order)
            down = replace(down, weight=replace(down.weight, order=None))
        both = self._multiply_linears(normed, [gate, up], f"layers.{layer}.gate_up")
        split = writer.nodes(
            "Split",
            [both],
            f"layers.{layer}.split",
            [f"layers.{layer}.gate", f"layers.{layer}.up"],
            axis=-1,
            num_outputs=2,
        )
        # x * sigmoid(x) in one node.
        silu = writer.node(
            "QuickGelu", [split[0]], f"layers.{layer}.silu", domain=MICROSOFT, alpha=1.0
        )
        product = writer.node("Mul", [silu, split[1]], f"layers.{layer}.gated")
        return self._multiply_linears(product, [down], f"layers.{layer}.down")

    def _add_and_norm(
        self, hidden: ir.Value, update: ir.Value, norm: str, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """Add to the residual stream; return it normed and as it is."""
        normed, _, _, total = self.writer.nodes(
            "SkipSimplifiedLayerNormalization",
            [hidden, update, self._norm(norm)],
            f"{name}.norm",
            [f"{name}.norm", "", "", f"{name}.residual"],
            domain=MICROSOFT,
            epsilon=self.architecture.norm_epsilon,
        )
        self._remember(normed, norm)
        return normed, total

    def _norm(self, module: str) -> ir.Value:
        gains = self.weights.floats(f"{module}.weight")
        if module in self.outliers:
            gains = gains.copy()
            gains[self.outliers[module]] /= FACTOR
        return self._stored(f"{module}.weight", gains)

    def _remember(self, normed: ir.Value, norm: str) -> None:
        if norm in self.outliers:
            self._divided[normed] = self.outliers[norm]

    # --- products ---------------------------------------------------------------------------------

    def _product(self, value: ir.Value, modules: Sequence[str], name: str) -> ir.Value:
        return self._multiply_linears(value, [self.weights.linear(m) for m in modules], name)

    def _multiply_linears(self, value: ir.Value, linears: Sequence[Linear], name: str) -> ir.Value:
        """The concatenated outputs of layers with the same input; one product if possible."""
        merged = _merge(linears)
        if merged is not None:
            return self._multiply(value, merged.weight, merged.bias, name)
        parts = [
            self._multiply(value, linear.weight, linear.bias, f"{name}.{number}")
            for number, linear in enumerate(linears)
        ]
        return self.writer.node("Concat", parts, name, axis=-1)

    def _multiply(
        self, value: ir.Value, weight: Weight, bias: NDArray[np.float32] | None, name: str
    ) -> ir.Value:
        writer = self.writer
        if isinstance(weight, BlockWeight):
            codes = writer.stored(f"{name}.codes", weight.codes)
            scales = writer.stored_small(f"{name}.scales", self._real(weight.scales))
            return self._multiply_blocks(value, weight, codes, scales, bias, name)
        if value in self._divided:
            weight = weight.copy()
            weight[:, self._divided[value]] *= FACTOR
        matrix = self._stored(f"{name}.weight", weight.T)
        if bias is None:
            return writer.node("MatMul", [value, matrix], name)
        product = writer.node("MatMul", [value, matrix], f"{name}.product")
        return writer.node("Add", [product, self._stored(f"{name}.bias", bias)], name)

    def _multiply_blocks(
        self,
        value: ir.Value,
        weight: BlockWeight,
        codes: ir.Value,
        scales: ir.Value,
        bias: NDArray[np.float32] | None,
        name: str,
    ) -> ir.Value:
        writer = self.writer
        columns = self._divided.get(value)
        lacking = None if columns is None else self._lacking(value, weight, columns, name)
        if weight.order is not None:
            value = self._gather_columns(value, weight.order, name)
        inputs: list[ir.Value | None] = [value, codes, scales]
        zeros = weight.packed_zeros()
        if zeros is not None or bias is not None:
            inputs.append(None if zeros is None else writer.stored_small(f"{name}.zeros", zeros))
        if bias is not None:
            inputs += [None, self._stored(f"{name}.bias", bias)]
        (product,) = writer.nodes(
            "MatMulNBits",
            inputs,
            name,
            [name if lacking is None else f"{name}.rounded"],
            domain=MICROSOFT,
            bits=weight.bits,
            block_size=weight.block_size,
            K=weight.columns,
            N=weight.rows,
            accuracy_level=self.options.accuracy_level,
        )
        if lacking is None:
            return product
        return writer.nodes("Add", [product, lacking], f"{name}.whole", [name])[0]

    def _lacking(
        self, value: ir.Value, weight: BlockWeight, columns: NDArray[np.int64], name: str
    ) -> ir.Value:
        """The float product that adds what dividing some columns of the input removed."""
        few = self._gather_columns(value, columns, f"{name}.outliers")
        floats = weight.dequantize_columns(columns) * np.float32(FACTOR - 1)
        matrix = self.writer.stored(f"{name}.outliers.weight", floats.T)
        return self.writer.node("MatMul", [few, matrix], f"{name}.outliers")

    def _stored(self, name: str, array: NDArray[np.float32]) -> ir.Value:
        """Floats in the data file, in the type of the activations."""
        return self.writer.stored(name, self._real(array, name))

    def _real(self, array: NDArray[np.float32], name: str = "a scale") -> NDArray[Any]:
        """Floats in the type of the activations, unless one of them is too large for it."""
        with np.errstate(over="ignore"):
            converted = array.astype(self.real, copy=False)
        if not np.isfinite(converted).all():
            raise ExportError(
                f"{name} holds {np.abs(array).max():.3g}, and {self.options.activations} holds at "
                f"most {np.finfo(self.options.activations).max:.5g}; leave activations at float32"
            )
        return converted

    def _gather_columns(self, value: ir.Value, order: NDArray[np.int64], name: str) -> ir.Value:
        """Put the input of a matrix in the order of its columns; matrices that agree share it."""
        key = (value, order.tobytes())
        if key not in self._gathered:
            indices = self.writer.stored(f"{name}.order", order.astype(np.int32))
            self._gathered[key] = self.writer.node(
                "Gather", [value, indices], f"{name}.ordered", axis=-1
            )
        return self._gathered[key]

    def _keep(self, values: Sequence[ir.Value], first: ir.Value) -> list[ir.Value]:
        """The positions whose logits are requested: those from ``first_logit`` on."""
        end = self.writer.constant("end", np.array([_ALL], np.int64))
        axis = self.writer.constant("sequence_axis", np.array([1], np.int64))
        return [
            self.writer.node("Slice", [value, first, end, axis], f"{value.name}.kept")
            for value in values
        ]

    def _slice(self, value: ir.Value, start: int, end: int, axis: int, name: str) -> ir.Value:
        bounds = [
            self.writer.constant(f"{name}.{part}", np.array([number], np.int64))
            for part, number in (("start", start), ("end", end), ("axis", axis))
        ]
        return self.writer.node("Slice", [value, *bounds], name)


def _merge(linears: Sequence[Linear]) -> Linear | None:
    """Layers stacked into one; None if the formats of their weights differ."""
    weight: Weight
    blocks = [linear.weight for linear in linears if isinstance(linear.weight, BlockWeight)]
    floats = [linear.weight for linear in linears if not isinstance(linear.weight, BlockWeight)]
    if not blocks:
        weight = np.concatenate(floats)
    elif not floats and can_stack(blocks):
        weight = stack(blocks)
    else:
        return None
    if all(linear.bias is None for linear in linears):
        return Linear(weight, None)
    biases = [
        np.zeros(_rows(linear.weight), np.float32) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return Linear(weight, np.concatenate(biases))


def _take_rows(linear: Linear, order: NDArray[np.int64]) -> Linear:
    weight = linear.weight
    return Linear(
        weight.take_rows(order) if isinstance(weight, BlockWeight) else weight[order],
        None if linear.bias is None else linear.bias[order],
    )


def _rows(weight: Weight) -> int:
    return weight.rows if isinstance(weight, BlockWeight) else len(weight)
