from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from quantize.gptq import (
    blocks,
    column_order,
    inverse_factor,
    quantize_weight,
    round_weight,
)
from quantize.settings import GptqSettings, RoundingSettings
from tests.reference.gptq import slow_gptq


def correlated(columns: int, seed: int, samples: int = 400) -> Tensor:
    """The mean of x x^T over inputs of unequal size that depend on one another, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sizes = torch.rand(columns, generator=generator, dtype=torch.float64) * 3
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    x = (x @ (torch.eye(columns, dtype=torch.float64) + 0.4 * mixing)) * sizes
    return x.T @ x / samples


def weights(outputs: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(outputs, columns, generator=generator, dtype=torch.float64)


def output_error(W: Tensor, Q: np.ndarray, H: Tensor) -> float:
    difference = W - torch.from_numpy(Q).to(W.dtype)
    return float(torch.trace(difference @ H @ difference.T))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("columns", "group_size"), [(48, 16), (48, -1), (160, 32), (144, 144), (320, 160), (40, 40)]
)
def test_codes_equal_those_of_the_textbook_that_inverts_at_every_column(
    bits: int, symmetric: bool, columns: int, group_size: int
) -> None:
    W, H = weights(6, columns, bits), correlated(columns, columns)
    settings = GptqSettings(
        bits=bits, group_size=group_size, symmetric=symmetric, order="none", scale_search=1
    )
    result = quantize_weight(W, H, settings)
    codes, scales, zeros, loss = slow_gptq(
        W.numpy(), H.numpy(), bits=bits, group_size=group_size, symmetric=symmetric, damp=0.01
    )
    np.testing.assert_array_equal(result.weight.codes, codes)
    np.testing.assert_array_equal(result.weight.scales.astype(np.float64), scales)
    np.testing.assert_array_equal(result.weight.zeros, zeros)
    assert float(result.losses.sum()) == pytest.approx(loss, rel=1e-9)


def test_codes_in_group_order_equal_those_of_the_textbook() -> None:
    W, H = weights(6, 96, 3), correlated(96, 3)
    result = quantize_weight(W, H, GptqSettings(group_size=16, order="group", scale_search=1))
    order = column_order(H.diagonal(), 16, "group").tolist()
    codes, scales, _, loss = slow_gptq(
        W.numpy(), H.numpy(), bits=4, group_size=16, symmetric=True, damp=0.01, order=order
    )
    np.testing.assert_array_equal(result.weight.codes, codes)
    np.testing.assert_array_equal(result.weight.scales.astype(np.float64), scales)
    assert float(result.losses.sum()) == pytest.approx(loss, rel=1e-9)
    assert result.weight.ordered


def test_float32_finds_the_codes_of_float64() -> None:
    W, H = weights(64, 256, 5), correlated(256, 5, samples=2000)
    settings = GptqSettings(group_size=64)
    exact = quantize_weight(W, H, settings).weight.codes
    single = quantize_weight(W.float(), H.float(), settings).weight.codes
    # A weight in the middle between two codes may fall either way, and its row follow it.
    assert (exact == single).mean() > 0.995


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_do_not_depend_on_one_another_leave_plain_rounding(symmetric: bool) -> None:
    W = weights(8, 64, 1)
    gptq = GptqSettings(group_size=16, symmetric=symmetric, scale_search=1)
    rounding = RoundingSettings(group_size=16, symmetric=symmetric)
    result = quantize_weight(W, torch.eye(64, dtype=torch.float64), gptq).weight
    plain = round_weight(W, rounding)
    np.testing.assert_array_equal(result.codes, plain.codes)
    np.testing.assert_array_equal(result.scales, plain.scales)
    np.testing.assert_array_equal(result.zeros, plain.zeros)


def test_rounding_is_the_nearest_point_of_the_covering_grid() -> None:
    W = torch.tensor([[-3.0, 1.0, 0.2, 3.75], [0.5, 0.0, 0.0, -0.9375]])
    weight = round_weight(W, RoundingSettings(group_size=4))
    assert weight.scales.tolist() == [[0.5], [0.125]]
    # 3.75 / 0.5 = 7.5 rounds to 8 steps above the zero, one more than there are.
    assert weight.codes.tolist() == [[2, 10, 8, 15], [12, 8, 8, 0]]
    assert weight.dequantize().tolist() == [[-3.0, 1.0, 0.0, 3.5], [0.5, 0.0, 0.0, -1.0]]


def test_asymmetric_rounding_holds_both_ends_and_zero() -> None:
    W = torch.tensor([[-1.0, 6.5, 0.0, 2.2], [1.0, 3.0, 7.5, 2.0]])
    weight = round_weight(W, RoundingSettings(group_size=4, symmetric=False))
    assert weight.scales.tolist() == [[0.5], [0.5]]
    assert weight.zeros.tolist() == [[2], [0]]
    assert weight.dequantize().tolist() == [[-1.0, 6.5, 0.0, 2.0], [1.0, 3.0, 7.5, 2.0]]


@pytest.mark.parametrize("order", ["none", "group"])
@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_change_less_than_by_plain_rounding(
    order: Literal["none", "group"], bits: int
) -> None:
    W, H = weights(32, 128, 7), correlated(128, 7)
    settings = GptqSettings(bits=bits, group_size=32, order=order, scale_search=1)
    found = quantize_weight(W, H, settings).weight.dequantize()
    plain = round_weight(W, RoundingSettings(bits=bits, group_size=32)).dequantize()
    assert output_error(W, found, H) < 0.6 * output_error(W, plain, H)


def test_a_searched_scale_is_no_worse_than_the_covering_one() -> None:
    W, H = weights(64, 128, 8), correlated(128, 8)
    W[:, ::16] *= 4
    errors = [
        output_error(
            W,
            quantize_weight(
                W, H, GptqSettings(group_size=64, scale_search=search)
            ).weight.dequantize(),
            H,
        )
        for search in (1, 16)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_a_scale_is_chosen_from_the_weights_as_the_walk_finds_them() -> None:
    # Both groups lie in one block of columns; the first moves the second before it is looked at.
    H = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64).kron(
        torch.eye(16, dtype=torch.float64)
    )
    W = weights(4, 32, 9)
    settings = GptqSettings(group_size=16, order="none", scale_search=1)
    moved = quantize_weight(W, H, settings).weight.scales[:, 1]
    untouched = round_weight(W, RoundingSettings(group_size=16)).scales[:, 1]
    assert (moved != untouched).all()


def test_scales_are_those_that_are_stored() -> None:
    W, H = weights(8, 64, 10) * 0.0123, correlated(64, 10)
    result = quantize_weight(W, H, GptqSettings(bits=8, group_size=32, order="none"))
    difference = W - torch.from_numpy(result.weight.dequantize()).double()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    lost = torch.einsum("nk,kl,nl->n", difference, damped, difference)
    # Equal only if the errors that were made up for are those of the float16 scales. Dequantizing
    # is done in float32.
    torch.testing.assert_close(result.losses, lost, rtol=1e-4, atol=0)


def test_stacked_weights_get_the_codes_that_each_gets_alone() -> None:
    first, second, H = weights(4, 64, 11), weights(6, 64, 12), correlated(64, 11)
    settings = GptqSettings(group_size=32)
    parts = quantize_weight(torch.cat([first, second]), H, settings).split([4, 6])
    for part, W in zip(parts, (first, second), strict=True):
        alone = quantize_weight(W, H, settings)
        np.testing.assert_array_equal(part.weight.codes, alone.weight.codes)
        np.testing.assert_array_equal(part.weight.scales, alone.weight.scales)
        torch.testing.assert_close(part.losses, alone.losses)


def test_dead_inputs_get_the_code_of_zero_and_are_counted() -> None:
    W, H = weights(4, 32, 13), correlated(32, 13)
    dead = [3, 17]
    H[dead] = 0
    H[:, dead] = 0
    orders: tuple[Literal["none", "group"], ...] = ("none", "group")
    for order in orders:
        result = quantize_weight(W, H, GptqSettings(group_size=16, order=order, scale_search=1))
        assert result.dead_columns == 2
        assert (result.weight.codes[:, dead] == 8).all()
        assert (result.weight.dequantize()[:, dead] == 0).all()
    codes, *_ = slow_gptq(
        W.numpy(),
        H.numpy(),
        bits=4,
        group_size=16,
        symmetric=True,
        damp=0.01,
        order=column_order(
            torch.where(H.diagonal() == 0, H.diagonal().sum() / 30, H.diagonal()), 16, "group"
        ).tolist(),
    )
    np.testing.assert_array_equal(result.weight.codes, codes)


def test_inputs_that_are_all_zero_are_no_failure() -> None:
    result = quantize_weight(
        weights(4, 32, 14), torch.zeros(32, 32, dtype=torch.float64), GptqSettings(group_size=16)
    )
    assert result.dead_columns == 32
    assert (result.weight.dequantize() == 0).all()


def test_damping_is_raised_until_there_is_a_factor_and_reported() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    H = x.T @ x
    H[0, 1] += 0.02 * H.diagonal().mean()  # not quite positive, as rounding makes it
    H[1, 0] = H[0, 1]
    result = quantize_weight(
        weights(4, 64, 15).float(), H, GptqSettings(group_size=32, damp_percent=1e-6)
    )
    assert 1e-6 < result.damping < 0.1
    assert np.isfinite(result.weight.dequantize()).all()


def test_the_factor_squares_to_the_inverse() -> None:
    H = correlated(40, 16)
    U, damping = inverse_factor(H, 0.02)
    assert damping == 0.02
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    damped = H + 0.02 * H.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(40, dtype=torch.float64))


def test_groups_with_large_inputs_go_first_and_stay_together() -> None:
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 3.0])
    assert column_order(diagonal, 2, "group").tolist() == [3, 2, 1, 0, 4, 5]
    assert column_order(diagonal, 2, "none").tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("columns", "group_size"), [(576, 64), (576, 96), (576, 192), (600, 200), (64, 1), (300, 300)]
)
def test_blocks_cover_every_column_and_never_begin_inside_a_shared_group(
    columns: int, group_size: int
) -> None:
    runs = list(blocks(columns, group_size))
    assert [column for run in runs for column in range(*run)] == list(range(columns))
    starts = {start for start, _ in runs}
    for start, end in runs:
        begun = [k for k in range(start, end) if k % group_size == 0]
        # A group that begins inside a block ends in it, or begins with it.
        assert all(k + group_size <= end or k in starts for k in begun)


def test_a_group_of_nothing_is_zero() -> None:
    W, H = weights(4, 32, 17), correlated(32, 17)
    W[:, :16] = 0
    H[:16, 16:] = 0
    H[16:, :16] = 0
    for symmetric in (True, False):
        weight = quantize_weight(W, H, GptqSettings(group_size=16, symmetric=symmetric)).weight
        assert (weight.dequantize()[:, :16] == 0).all()
        assert (weight.scales > 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    W = weights(4, 32, 18)
    with pytest.raises(ValueError, match="H of 32 columns"):
        quantize_weight(W, correlated(16, 1), GptqSettings(group_size=16))
    with pytest.raises(ValueError, match="do not divide"):
        quantize_weight(W, correlated(32, 1), GptqSettings(group_size=24))
