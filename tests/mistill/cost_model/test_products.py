from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir
import pytest

from mistill.cost_model import products
from mistill.cost_model.onnx_cost import product_weights
from mistill.cost_model.processors import held_to_first_processor, usable_processors
from mistill.cost_model.products import Kernel, kernel_speed, open_products, weights_per_second


def test_products_of_made_up_matrices_are_products():
    """With ones for input, codes and scales tell the answer by hand."""
    session = open_products(Kernel("int4", 64), 96, 128, threads=1, copies=2)
    results = session.run(None, {"x": np.ones((3, 128), np.float32)})
    codes = np.random.default_rng(0).integers(0, 256, (96, 2, 32), np.uint8)
    steps = (codes & 15).astype(int) + (codes >> 4) - 16
    by_hand = 0.01 * steps.sum((1, 2))
    assert len(results) == 2
    for result in results:
        np.testing.assert_allclose(result, np.tile(by_hand, (3, 1)), rtol=0, atol=1e-4)


def test_every_thread_but_the_first_has_a_processor_of_its_own():
    processors = usable_processors()
    if len(processors) < 2:
        pytest.skip("needs two processors")
    name = "session.intra_op_thread_affinities"
    two = open_products(Kernel("int4", 64), 96, 128, threads=2).get_session_options()
    assert two.get_session_config_entry(name) == str(processors[1] + 1)  # it counts from 1
    for threads in (1, len(processors) + 1):
        session = open_products(Kernel("int4", 64), 96, 128, threads=threads)
        with pytest.raises(RuntimeError, match=name):
            session.get_session_options().get_session_config_entry(name)


def test_the_speed_of_a_kernel_is_free_of_what_every_run_begins_with():
    # 5 microseconds for nothing, and 10 for each 1,024 rows of 1,024.
    few, many = (5e-6 + rows / 1024 * 10e-6 for rows in products.ROWS)
    assert weights_per_second(few, many) == pytest.approx(1024 * 1024 / 10e-6)


def test_a_disturbed_clock_bounds_the_speed_of_a_kernel():
    assert weights_per_second(1e-3, 1e-3) == pytest.approx(4096 * 1024 / 1e-3)


def test_the_speed_of_a_kernel_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_SECONDS", 0.01)
    kernel_speed.cache_clear()
    assert 1e7 < kernel_speed(Kernel("int4", 64), 1) < 1e13
    kernel_speed.cache_clear()


def test_weights_of_a_step_are_counted_by_kernel():
    def product(bits: int, block: int, rows: int, columns: int, level: int = 4) -> ir.Node:
        return ir.node(
            "MatMulNBits",
            [ir.val("x"), ir.val("codes"), ir.val("scales")],
            domain="com.microsoft",
            attributes={
                "bits": bits,
                "block_size": block,
                "K": columns,
                "N": rows,
                "accuracy_level": level,
            },
        )

    nodes = [
        product(4, 64, 10, 128),
        product(4, 64, 5, 128),
        product(8, 32, 7, 64),
        product(8, 32, 7, 64, level=0),  # multiplied in float32
        ir.node("MatMul", [ir.val("x"), ir.val("w")]),
    ]
    graph = ir.Graph([], [], nodes=nodes, opset_imports={"": 21, "com.microsoft": 1})
    assert product_weights(graph) == {Kernel("int4", 64): 15 * 128, Kernel("int8", 32): 7 * 64}


def test_a_thread_is_held_to_one_processor_and_let_go():
    before = usable_processors()
    if len(before) < 2:
        pytest.skip("needs two processors")
    with pytest.raises(KeyError), held_to_first_processor():
        assert usable_processors() == before[:1]
        raise KeyError
    assert usable_processors() == before


def test_a_system_that_does_not_tell_its_processors_holds_no_thread(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_processors() == []
    with held_to_first_processor():
        pass
