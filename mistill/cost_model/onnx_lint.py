"""A lint of ONNX graphs: operators that ONNX Runtime computes slowly on a CPU.

A correct graph can be a hundred times slower than necessary without any warning, because of a
missing attribute, an input that no fast kernel supports, or an operator that has no fast kernel.
Each rule states the measured slowdown (ONNX Runtime 1.31, AVX2, one row times 2048 by 2048, one
thread). The rules apply to graphs of any exporter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistill.cost_model.onnx_cost import StepCost, constant, is_view, step_cost
from mistill.errors import missing_extra

if TYPE_CHECKING:
    import onnx_ir as ir

INTEGER_LEVEL = 4
"""The accuracy level of ``MatMulNBits`` that multiplies in 8-bit integers."""

_LEGAL_BLOCKS = (16, 32, 64, 128, 256)
_FAST_2_BIT_BLOCK = 32
_SLOWER_WITHOUT_LEVEL = {2: 100.0, 4: 5.0, 8: 100.0}
_ORDER_INPUT, _ZEROS_INPUT, _SCALES_INPUT = 4, 3, 2
_ATTENTIONS = ("Attention", "MultiHeadAttention", "DecoderMaskedMultiHeadAttention")
_CHOOSING = ("Slice", "Gather", "GatherND", "GatherElements")
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MatMulInteger", "MatMulBnb4")

WORDS = {
    "block-size": "blocks that ONNX Runtime does not multiply; legal are 16 to 256, in powers of 2",
    "accuracy-level": "codes multiplied in float32; set accuracy_level to 4",
    "order-input": "g_idx given, for which there is no fast kernel; sort the columns and gather "
    "the input instead",
    "nf4-kernel": "NF4 decoded at every step; put its levels on an 8-bit grid instead",
    "2-bit-kernel": "2-bit codes in blocks below 32 or with zeros that are floats; store them as "
    "codes of 4 bits",
    "decoded-weights": "weights decoded to float at every step; multiply the codes with "
    "MatMulNBits instead",
    "half-precision": "16-bit floats, which most CPUs have to widen first; use float32 beside "
    "the codes",
    "attention-not-fused": "attention in single operators; use GroupQueryAttention",
    "cache-copied": "the whole cache of keys and values copied at every step; use "
    "GroupQueryAttention, which extends it in place",
    "every-logit": "logits of every token of a prompt, where the last one's are needed",
    "float-head": "a float output head beside quantized layers; 8 bits are a quarter of its bytes",
}
"""Every rule, and what a graph that breaks it does."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule that a graph breaks.

    Attributes:
        rule: Its name, a key of ``WORDS``.
        nodes: The nodes that break it.
        slower: How many times as long such a node takes as the best one; None where that
            depends on the model.
    """

    rule: str
    nodes: tuple[str, ...]
    slower: float | None = None

    def __str__(self) -> str:
        """The finding in words."""
        others = f" and {len(self.nodes) - 1} more" if self.nodes[1:] else ""
        cost = "" if self.slower is None else f" (about {self.slower:g} times slower)"
        return f"{self.rule}{cost}: {WORDS[self.rule]} [{self.nodes[0]}{others}]"


@dataclass(frozen=True, kw_only=True)
class Lint:
    """What was found in a graph.

    Attributes:
        findings: The rules that it breaks, the most costly first.
        operators: How many nodes there are of each type.
        cost: Bytes that a step reads.
    """

    findings: tuple[Finding, ...]
    operators: dict[str, int]
    cost: StepCost

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values.

        Returns:
            One entry per field.
        """
        return {
            "findings": [{**asdict(one), "words": str(one)} for one in self.findings],
            "operators": self.operators,
            **asdict(self.cost),
        }


def lint_file(file: str | Path) -> Lint:
    """Check a graph against the rules, without reading its weights.

    Args:
        file: An .onnx file, whoever made it.

    Returns:
        The findings.

    Raises:
        MissingExtraError: If the package onnx-ir is not installed.
    """
    try:
        import onnx_ir
    except ModuleNotFoundError as error:
        raise missing_extra("onnx-ir", "compress") from error
    graph = onnx_ir.load(file).graph
    nodes = list(graph.all_nodes())
    broken: dict[tuple[str, float | None], list[str]] = {}
    for node in nodes:
        for rule, slower in _broken_by(node):
            broken.setdefault((rule, slower), []).append(_name(node))
    for rule, node in _broken_by_graph(graph):
        broken.setdefault((rule, None), []).append(_name(node))
    findings = [
        Finding(rule=rule, nodes=tuple(names), slower=slower)
        for (rule, slower), names in broken.items()
    ]
    operators: dict[str, int] = {}
    for node in nodes:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return Lint(
        findings=tuple(sorted(findings, key=lambda one: -(one.slower or 0))),
        operators=dict(sorted(operators.items())),
        cost=step_cost(graph),
    )


# --- what a node tells by itself ----------------------------------------------------------------


def _broken_by(node: ir.Node) -> Iterator[tuple[str, float | None]]:
    """Rules that a node breaks, and how many times slower it is for that."""
    if node.op_type == "MatMulNBits":
        yield from _broken_by_product(node)
    elif node.op_type == "MatMulBnb4":
        yield "nf4-kernel", 65.0
    elif node.op_type in _PRODUCTS and _decodes(node):
        yield "decoded-weights", None
    elif node.op_type in _PRODUCTS and _is_half(_input(node, 1)):
        yield "half-precision", None
    elif node.op_type == "Softmax" and _inside_attention(node):
        yield "attention-not-fused", None
    elif node.op_type in _ATTENTIONS or (
        node.op_type == "Concat" and any(_is_past(value) for value in node.inputs)
    ):
        yield "cache-copied", None


def _broken_by_product(node: ir.Node) -> Iterator[tuple[str, float | None]]:
    bits = node.attributes.get_int("bits", 4)
    block = node.attributes.get_int("block_size", 32)
    if block not in _LEGAL_BLOCKS:
        yield "block-size", None
    if _input(node, _ORDER_INPUT) is not None:
        yield "order-input", 50.0
    if node.attributes.get_int("accuracy_level", 0) != INTEGER_LEVEL:
        yield "accuracy-level", _SLOWER_WITHOUT_LEVEL.get(bits)
    zeros = constant(_input(node, _ZEROS_INPUT))
    if bits == 2 and (block < _FAST_2_BIT_BLOCK or (zeros is not None and _is_float(zeros))):
        yield "2-bit-kernel", 60.0
    if _is_half(_input(node, _SCALES_INPUT)):
        yield "half-precision", None


def _decodes(node: ir.Node) -> bool:
    """Whether the second factor is weights that are decoded first."""
    value = _input(node, 1)
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in ("Transpose", "Reshape", "Cast"):
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    return (
        producer is not None
        and producer.op_type == "DequantizeLinear"
        and constant(producer.inputs[0]) is not None
    )


def _inside_attention(node: ir.Node) -> bool:
    """Whether a softmax stands between two products."""
    before = _sources(node, ("Add", "Mul", "Div", "Where", "Cast", "Reshape", "Sub", "Tanh"))
    after = {use.node.op_type for output in node.outputs for use in output.uses()}
    after |= {
        use.node.op_type
        for output in node.outputs
        for cast in output.uses()
        if cast.node.op_type in ("Cast", "Reshape", "Dropout", "Where")
        for use in cast.node.outputs[0].uses()
    }
    products = {"MatMul", "FusedMatMul", "Einsum", "Gemm"}
    return bool(before & products) and bool(after & products)


def _sources(node: ir.Node, through: tuple[str, ...]) -> set[str]:
    """Types of the nodes whose results arrive at a node, through some others."""
    types: set[str] = set()
    waiting, visited = [node], {node}
    while waiting:
        for value in waiting.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is None or producer in visited:
                continue
            visited.add(producer)
            types.add(producer.op_type)
            if producer.op_type in through:
                waiting.append(producer)
    return types


def _is_past(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and "past" in (value.name or "")


# --- what only the whole graph tells ------------------------------------------------------------


def _broken_by_graph(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    head = None if logits is None else logits.producer()
    while head is not None and head.op_type not in _PRODUCTS:
        value = next((one for one in head.inputs if one is not None), None)
        head = None if value is None else value.producer()
    if head is None:
        return
    if not _positions_chosen(head):
        yield "every-logit", head
    quantized = any(node.op_type == "MatMulNBits" for node in graph)
    if quantized and head.op_type in ("MatMul", "FusedMatMul", "Gemm") and not _decodes(head):
        yield "float-head", head


def _positions_chosen(head: ir.Node) -> bool:
    """Whether some positions are picked between the embedding and the head.

    Attention reads every position, so the search ends there.
    """
    waiting, visited = [head], {head}
    while waiting:
        node = waiting.pop()
        for value in node.inputs[:2]:
            producer = None if value is None else value.producer()
            if producer is None or producer in visited:
                continue
            if producer.op_type in _CHOOSING and _picks_positions(producer):
                return True
            visited.add(producer)
            if producer.op_type not in (*_ATTENTIONS, "GroupQueryAttention", "Softmax"):
                waiting.append(producer)
    return False


def _picks_positions(node: ir.Node) -> bool:
    """A choice among values that are computed, along an axis other than their columns."""
    if constant(node.inputs[0]) is not None:
        return False
    if node.op_type != "Slice":
        # A gather of the columns by a stored order runs along the last axis.
        return node.attributes.get_int("axis", 0) in (0, 1)
    axes = constant(_input(node, 3))
    return axes is None or axes.numpy().tolist() in ([0], [1], [0, 1], [-2])


# --- small words --------------------------------------------------------------------------------


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_half(value: ir.Value | None) -> bool:
    import onnx_ir

    halves = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
    producer = None if value is None else value.producer()
    while producer is not None and is_view(producer):
        if producer.op_type == "Cast":
            return producer.attributes.get_int("to", 0) in [int(half) for half in halves]
        before = producer.inputs[0]
        producer = None if before is None else before.producer()
    tensor = constant(value)
    return tensor is not None and tensor.dtype in halves


def _is_float(tensor: ir.TensorProtocol) -> bool:
    return bool(tensor.dtype.is_floating_point())
