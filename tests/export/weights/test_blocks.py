"""Codes in blocks stand for the weights that they came from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.weights.blocks import (
    NF4_STEPS,
    BlockWeight,
    blocks_of_codes,
    blocks_of_nf4,
    can_stack,
    round_to_blocks,
    stack,
)
from mistill.errors import ExportError
from mistill.weights.gptq_layout import pack
from tests.export.sources import quantized_weight
from tests.reference.blocks import decode


def random_weight(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def equal(left: NDArray[Any], right: NDArray[Any]) -> bool:
    return left.dtype == right.dtype and np.array_equal(left, right)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("columns", "group_size", "largest", "block"),
    [
        (64, 32, 128, 32),
        (64, 32, 16, 16),
        (128, 128, 32, 32),
        (96, 48, 256, 16),
        (64, -1, 256, 64),
        (96, -1, 64, 32),
        (72, -1, 64, 16),
        (1024, 512, 256, 256),
        (160, 64, 128, 32),
    ],
)
def test_gptq_codes_stand_for_the_same_weights_in_blocks(
    bits: int,
    symmetric: bool,
    act_order: bool,
    columns: int,
    group_size: int,
    largest: int,
    block: int,
) -> None:
    order = np.random.default_rng(1).permutation(columns) if act_order else None
    source = quantized_weight(
        random_weight(8, columns),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        order=order,
    )
    weight = blocks_of_codes(source, largest)
    if not (act_order and columns % group_size):  # there a short group may come anywhere
        assert weight.block_size == block
    assert (weight.zeros is None) == symmetric
    assert (weight.order is None) == (not act_order or group_size in (-1, columns))
    # The same products of the same float32 numbers, so equal to the last bit.
    assert equal(decode(weight), source.dequantize())
    assert equal(weight.dequantize(), source.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_hold_the_very_bytes_of_the_checkpoint(bits: int) -> None:
    source = quantized_weight(random_weight(16, 128), bits=bits, group_size=32)
    stored = pack(source, "gptq")["qweight"]
    expected = np.ascontiguousarray(stored.T).view(np.uint8)
    assert blocks_of_codes(source, 32).codes.tobytes() == expected.tobytes()


def test_a_last_group_that_is_shorter_is_kept() -> None:
    source = quantized_weight(random_weight(8, 80), bits=4, group_size=32)
    weight = blocks_of_codes(source, 128)
    assert weight.block_size == 16
    assert equal(decode(weight), source.dequantize())


def test_groups_that_no_block_fits_are_refused() -> None:
    source = quantized_weight(random_weight(8, 48), bits=4, group_size=24)
    with pytest.raises(ExportError, match="groups of 24 columns"):
        blocks_of_codes(source, 128)


def test_padding_stands_for_zero() -> None:
    source = quantized_weight(random_weight(8, 72), bits=4, group_size=-1, symmetric=False)
    weight = blocks_of_codes(source, 64)
    assert weight.codes.shape == (8, 5, 8)
    assert weight.zeros is not None
    padding = weight.codes[:, -1, 4:]
    assert equal(padding & 15, weight.zeros[:, -1:].repeat(4, axis=1))
    assert equal(padding >> 4, weight.zeros[:, -1:].repeat(4, axis=1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 72])
def test_rounding_moves_a_weight_by_at_most_half_a_step(bits: int, columns: int) -> None:
    source = random_weight(16, columns)
    weight = round_to_blocks(source, bits, 32)
    steps = np.abs(weight.scales).repeat(weight.block_size, axis=1)[:, :columns]
    apart = np.abs(decode(weight) - source)
    # At 4 bits the range has no code opposite to the largest weight, so that one side is clipped
    # by up to a whole step.
    assert (apart <= steps * (0.5001 if bits == 8 else 1.0001)).all()
    assert (apart <= steps * 0.5001).mean() > 0.97


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rounding_keeps_the_largest_weight_of_a_block(bits: int, sign: int) -> None:
    source = random_weight(4, 32) * 0.1
    source[:, 7] = sign * np.array([1, 2, 3, 4])
    # The scale is a float16 number.
    assert np.allclose(decode(round_to_blocks(source, bits, 32))[:, 7], source[:, 7], rtol=2**-11)


@pytest.mark.parametrize(("size", "half"), [(1.0, True), (1e-5, False), (1e7, False)])
def test_scales_are_float16_numbers_where_those_are_exact_enough(size: float, half: bool) -> None:
    source = random_weight(64, 64) * np.float32(size)
    weight = round_to_blocks(source, 4, 32)
    with np.errstate(over="ignore"):
        in_half = weight.scales.astype(np.float16).astype(np.float32)
    assert equal(in_half, weight.scales) == half
    error = np.abs(decode(weight) - source)
    assert (error <= np.abs(weight.scales).repeat(32, axis=1) * 1.001).all()


def test_rounding_a_block_of_zeros_gives_zeros() -> None:
    source = random_weight(4, 64)
    source[:, :32] = 0
    decoded = decode(round_to_blocks(source, 4, 32))
    assert (decoded[:, :32] == 0).all()
    assert np.isfinite(decoded).all()


def test_rounding_many_rows_is_rounding_each() -> None:
    source = random_weight(5000, 16)
    weight = round_to_blocks(source, 8, 16)
    assert equal(weight.codes[4990:], round_to_blocks(source[4990:], 8, 16).codes)
    assert equal(weight.scales[4990:], round_to_blocks(source[4990:], 8, 16).scales)
    assert np.allclose(weight.dequantize(), source, atol=0.02)


@pytest.mark.parametrize(
    ("columns", "run", "largest"),
    [(128, 64, 64), (64, 64, 256), (192, 64, 16), (128, 32, 64), (256, 128, 256), (1024, 512, 256)],
)
def test_nf4_moves_by_less_than_half_a_percent(columns: int, run: int, largest: int) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    source = torch.from_numpy(random_weight(32, columns))
    codes, state = quantize_4bit(source, blocksize=run, quant_type="nf4")
    weight = blocks_of_nf4(
        codes.numpy().reshape(-1),
        state.code.numpy(),
        state.absmax.numpy(),
        (32, columns),
        run,
        largest,
    )
    expected = dequantize_4bit(codes, state).numpy()
    error = np.linalg.norm(decode(weight) - expected) / np.linalg.norm(expected)
    assert error < (0.005 if run <= 64 else 0.008)  # larger runs use fewer of the outer levels
    assert weight.block_size == min(largest, run)


def test_nf4_levels_lie_on_the_grid_better_than_on_its_neighbours() -> None:
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device="cpu").numpy()

    def error(steps: float) -> float:
        return float(np.abs(np.rint(levels * steps) / steps - levels).max())

    assert error(NF4_STEPS) < min(error(127.0), error(120.0), error(112.0))


@pytest.mark.parametrize(
    ("run", "words"), [(64, "72 columns"), (72, "blocks of 72 cannot"), (128, "blocks of 128")]
)
def test_nf4_runs_that_no_blocks_hold_are_refused(run: int, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        blocks_of_nf4(
            np.zeros(72 * 8 // 2, np.uint8),
            np.linspace(-1, 1, 16, dtype=np.float32),
            np.ones(9, np.float32),
            (8, 72),
            run,
            64,
        )


def test_stacked_matrices_are_the_matrices_below_one_another() -> None:
    first = blocks_of_codes(
        quantized_weight(random_weight(8, 64, 1), bits=4, group_size=32, symmetric=False), 64
    )
    second = round_to_blocks(random_weight(16, 64, 2), 4, 16)
    assert can_stack([first, second])
    both = stack([first, second])
    assert both.block_size == 16
    assert equal(decode(both), np.concatenate([decode(first), decode(second)]))


def test_matrices_of_different_kinds_are_not_stacked() -> None:
    weight = round_to_blocks(random_weight(8, 64), 4, 32)
    mixed = quantized_weight(
        random_weight(8, 64), bits=4, group_size=32, order=np.arange(64)[::-1].copy()
    )
    assert can_stack([weight, weight])
    assert not can_stack([weight, round_to_blocks(random_weight(8, 64), 8, 32)])
    assert not can_stack([weight, blocks_of_codes(mixed, 32)])


def test_padded_matrices_in_different_blocks_stack() -> None:
    wide = round_to_blocks(random_weight(8, 40, 1), 8, 16)
    assert wide.codes.shape[1] == 3
    coarse = BlockWeight(
        np.full((8, 1, 64), 129, np.uint8), np.ones((8, 1), np.float32), None, 8, 40
    )
    both = stack([wide, coarse])
    assert equal(decode(both), np.concatenate([decode(wide), np.ones((8, 40), np.float32)]))


def test_rows_in_another_order_are_the_same_rows() -> None:
    source = quantized_weight(random_weight(8, 32), bits=4, group_size=16, symmetric=False)
    weight = blocks_of_codes(source, 16)
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    assert equal(decode(weight.take_rows(order)), decode(weight)[order])
