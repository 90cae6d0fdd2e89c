"""Every slow kernel is named, in a graph that has it and in no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from export.graph.writer import MICROSOFT, GraphWriter
from mistill.cost_model.onnx_cost import StepCost, memory_speed
from mistill.cost_model.onnx_lint import WORDS, Finding, Lint, lint_file

K, N = 64, 32


def product(
    writer: GraphWriter,
    value: ir.Value,
    name: str,
    *,
    bits: int = 4,
    block: int = 32,
    scales: type[np.generic] = np.float32,
    zeros: type[np.generic] | None = None,
    order: bool = False,
    **attributes: int,
) -> ir.Value:
    """A product of codes, right unless told otherwise."""
    attributes = {"accuracy_level": 4, **attributes}
    blocks = K // block
    inputs: list[ir.Value | None] = [
        value,
        writer.stored(f"{name}.codes", np.zeros((N, blocks, block * bits // 8), np.uint8)),
        writer.stored(f"{name}.scales", np.ones((N, blocks), scales)),
        None if zeros is None else writer.stored(f"{name}.zeros", np.zeros((N, blocks), zeros)),
    ]
    if order:
        inputs.append(writer.stored(f"{name}.g_idx", np.zeros(K, np.int32)))
    while inputs[-1] is None:
        inputs.pop()
    return writer.node(
        "MatMulNBits",
        inputs,
        name,
        domain=MICROSOFT,
        bits=bits,
        block_size=block,
        K=K,
        N=N,
        **attributes,
    )


def last(writer: GraphWriter, value: ir.Value, name: str = "last") -> ir.Value:
    bounds = [writer.constant(f"{name}.{n}", np.array([n], np.int64)) for n in (-1, 9, 1)]
    return writer.node("Slice", [value, *bounds], name)


def lint(
    folder: Path, build: Callable[[GraphWriter, ir.Value], ir.Value], *, prune: bool = True
) -> Lint:
    """Lint a graph of what ``build`` makes of one input."""
    with GraphWriter(folder) as writer:
        value = writer.input("x", np.float32, ["batch", "sequence", K])
        result = build(writer, last(writer, value) if prune else value)
        writer.output(result, "logits", ["batch", 1, N])
        writer.save("test")
    return lint_file(folder / "model.onnx")


def matmul(writer: GraphWriter, value: ir.Value, dtype: type[np.generic] = np.float32) -> ir.Value:
    return writer.node("MatMul", [value, writer.stored("w", np.zeros((K, N), dtype))], "product")


def decoded(writer: GraphWriter, value: ir.Value) -> ir.Value:
    codes = writer.stored("q", np.zeros((N, K), np.int8))
    scale = writer.stored("s", np.ones((), np.float32))
    weight = writer.node("DequantizeLinear", [codes, scale], "decoded")
    turned = writer.node("Transpose", [weight], "turned")
    return writer.node("MatMul", [value, turned], "product")


def attention(writer: GraphWriter, value: ir.Value) -> ir.Value:
    keys = writer.node("Transpose", [value], "keys")
    scores = writer.node("MatMul", [value, keys], "scores")
    scaled = writer.node(
        "Div", [scores, writer.constant("eight", np.array(8, np.float32))], "scaled"
    )
    shares = writer.node("Softmax", [scaled], "shares", axis=-1)
    return matmul(writer, writer.node("MatMul", [shares, value], "mixed"))


def growing(writer: GraphWriter, value: ir.Value) -> ir.Value:
    past = writer.input("past_key_values.0.key", np.float32, ["batch", 1, "past", K])
    return matmul(writer, writer.node("Concat", [past, value], "present", axis=2))


def multi_head(writer: GraphWriter, value: ir.Value) -> ir.Value:
    read = [value, value, value]
    mixed = writer.node("MultiHeadAttention", read, "mixed", domain=MICROSOFT, num_heads=4)
    return matmul(writer, last(writer, mixed, "after"))  # what is picked before does not count


def codes(**options: Any) -> Callable[[GraphWriter, ir.Value], ir.Value]:
    return lambda writer, value: product(writer, value, "product", **options)


def nf4(writer: GraphWriter, value: ir.Value) -> ir.Value:
    packed = writer.stored("packed", np.zeros(N * K // 2, np.uint8))
    maxima = writer.stored("maxima", np.ones(N * K // 64, np.float32))
    inputs = [value, packed, maxima]
    return writer.node("MatMulBnb4", inputs, "product", domain=MICROSOFT, K=K, N=N)


def float_head(writer: GraphWriter, value: ir.Value) -> ir.Value:
    hidden = product(writer, value, "layer")
    wide = writer.stored("w", np.zeros((N, N), np.float32))
    return writer.node("MatMul", [hidden, wide], "product")


BROKEN: dict[str, tuple[str, Callable[[GraphWriter, ir.Value], ir.Value]]] = {
    "8 in a block": ("block-size", codes(block=8)),
    "level left out": ("accuracy-level", codes(accuracy_level=0)),
    "level of half floats": ("accuracy-level", codes(accuracy_level=2)),
    "8 bits at level 0": ("accuracy-level", codes(bits=8, accuracy_level=0)),
    "g_idx": ("order-input", codes(order=True)),
    "NF4": ("nf4-kernel", nf4),
    "2 bits in blocks of 16": ("2-bit-kernel", codes(bits=2, block=16)),
    "2 bits with float zeros": ("2-bit-kernel", codes(bits=2, zeros=np.float32)),
    "decoded": ("decoded-weights", decoded),
    "half scales": ("half-precision", codes(scales=np.float16)),
    "half weights": ("half-precision", lambda w, x: matmul(w, x, np.float16)),
    "single operators": ("attention-not-fused", attention),
    "growing cache": ("cache-copied", growing),
    "multi-head attention": ("cache-copied", multi_head),
    "float head": ("float-head", float_head),
}

SOUND: dict[str, Callable[[GraphWriter, ir.Value], ir.Value]] = {
    "4 bits": codes(),
    "8 bits in blocks of 16": codes(bits=8, block=16),
    "2 bits": codes(bits=2, zeros=np.uint8),
    "4 bits with float zeros": codes(zeros=np.float32),
    "floats": matmul,
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_is_broken_by_the_graph_that_breaks_it(name: str, tmp_path: Path) -> None:
    rule, build = BROKEN[name]
    found = lint(tmp_path, build)
    assert [finding.rule for finding in found.findings] == [rule]
    assert WORDS[rule] in str(found.findings[0])


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_sound_graph(name: str, tmp_path: Path) -> None:
    assert lint(tmp_path, SOUND[name]).findings == ()


def test_logits_of_the_whole_prompt_are_found(tmp_path: Path) -> None:
    found = lint(tmp_path, codes(), prune=False)
    assert [finding.rule for finding in found.findings] == ["every-logit"]


def test_a_gather_of_columns_is_no_choice_of_positions(tmp_path: Path) -> None:
    def build(writer: GraphWriter, value: ir.Value) -> ir.Value:
        order = writer.stored("order", np.arange(K, dtype=np.int32))
        ordered = writer.node("Gather", [value, order], "ordered", axis=-1)
        return product(writer, ordered, "product")

    found = lint(tmp_path, build, prune=False)
    assert [finding.rule for finding in found.findings] == ["every-logit"]
    assert lint(tmp_path, build).findings == ()


def test_every_rule_has_a_test() -> None:
    assert {rule for rule, _ in BROKEN.values()} | {"every-logit"} == WORDS.keys()


def test_nodes_that_break_one_rule_are_named_together(tmp_path: Path) -> None:
    def build(writer: GraphWriter, value: ir.Value) -> ir.Value:
        first = product(writer, value, "first", accuracy_level=0)
        wide = writer.stored("wide", np.zeros((N, K), np.float32))
        second = writer.node("MatMul", [first, wide], "second")
        return product(writer, second, "third", accuracy_level=0, order=True)

    found = lint(tmp_path, build)
    assert found.findings == (
        Finding(rule="order-input", nodes=("third",), slower=50.0),
        Finding(rule="accuracy-level", nodes=("first", "third"), slower=5.0),
    )
    assert "[first and 1 more]" in str(found.findings[1])
    assert "about 50 times slower" in str(found.findings[0])
    assert found.operators == {"MatMul": 1, "MatMulNBits": 2, "Slice": 1}


# --- bytes --------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_codes_and_of_their_packing(tmp_path: Path) -> None:
    cost = lint(tmp_path, codes(bits=4, block=32, zeros=np.uint8)).cost
    blocks = N * K // 32
    assert cost.bytes_per_token == N * K // 2 + 4 * blocks + blocks
    # 6 bits a weight, as ONNX Runtime serializes its packed codes.
    assert cost.packed_bytes_per_token == N * K * 6 // 8
    assert lint(tmp_path, codes(block=64)).cost.packed_bytes_per_token == N * K * 5 // 8


@pytest.mark.parametrize("times", [1, 2, 4])
def test_scales_that_loading_widens_and_repeats_count_as_they_are_read(
    times: int, tmp_path: Path
) -> None:
    blocks = K // 16
    few = np.arange(N * blocks // times, dtype=np.float32).reshape(N, -1)

    def build(writer: GraphWriter, value: ir.Value) -> ir.Value:
        codes = writer.stored("codes", np.zeros((N, blocks, 8), np.uint8))
        scales = writer.stored_small("scales", few.repeat(times, axis=1))
        settings = {"bits": 4, "block_size": 16, "K": K, "N": N, "accuracy_level": 4}
        return writer.node(
            "MatMulNBits", [value, codes, scales], "product", domain=MICROSOFT, **settings
        )

    cost = lint(tmp_path, build).cost
    assert cost.bytes_per_token == N * K // 2 + 4 * N * blocks
    assert cost.packed_bytes_per_token == N * K // 2 + 8 * N * blocks


def test_floats_are_read_as_they_are_and_a_table_row_by_row(tmp_path: Path) -> None:
    def build(writer: GraphWriter, value: ir.Value) -> ir.Value:
        ids = writer.input("ids", np.int64, ["batch", "sequence"])
        table = writer.stored("table", np.zeros((1000, K), np.float32))
        rows = writer.node("Gather", [table, ids], "rows", axis=0)
        return matmul(writer, writer.node("Add", [rows, value], "sum"))

    cost = lint(tmp_path, build).cost
    assert cost.bytes_per_token == cost.packed_bytes_per_token == 4 * K * N + 4 * K


def test_a_weight_read_twice_counts_once(tmp_path: Path) -> None:
    def build(writer: GraphWriter, value: ir.Value) -> ir.Value:
        weight = writer.stored("w", np.zeros((K, K), np.float32))
        first = writer.node("MatMul", [value, weight], "first")
        return writer.node("MatMul", [first, weight], "second")

    assert lint(tmp_path, build).cost.bytes_per_token == 4 * K * K


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 4), (np.int8, 1)])
def test_the_cache_costs_its_width_for_each_position(
    dtype: type[np.generic], size: int, tmp_path: Path
) -> None:
    def build(writer: GraphWriter, value: ir.Value) -> ir.Value:
        for part in ("key", "value"):
            writer.input(f"past_key_values.0.{part}", dtype, ["batch", 3, "past", 16])
        return matmul(writer, value)

    assert lint(tmp_path, build).cost.cache_bytes_per_position == 2 * 3 * 16 * size


def test_the_ceiling_is_memory_over_bytes() -> None:
    cost = StepCost(bytes_per_token=1, packed_bytes_per_token=1000, cache_bytes_per_position=10)
    assert cost.ceiling(1e6) == pytest.approx(1000)
    assert cost.ceiling(1e6, depth=100) == pytest.approx(500)


def test_memory_gives_more_than_a_disk_and_less_than_a_cache() -> None:
    assert 5e8 < memory_speed(1) < 2e12
    assert memory_speed(1) == memory_speed(1)  # measured once
