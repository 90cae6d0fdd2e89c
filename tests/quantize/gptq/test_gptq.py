from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from mistill.pytorch.factor import damped_factor, mirror_lower, rearranged
from quantize.gptq import gptq
from quantize.gptq.gptq import column_order, quantize_weight, reversed_blocks
from quantize.gptq.rounding import round_weight
from quantize.settings import GptqSettings, Order, RoundingSettings
from tests.reference.gptq import slow_gptaq, slow_gptq, slow_order


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


ORDERS: tuple[Order, ...] = ("static", "dynamic", "group", "none")


def require_textbook(
    W: Tensor, H: Tensor, settings: GptqSettings, shares: tuple[float, ...] = (1.0,)
) -> None:
    """Codes, grids, groups and error are those of the definition."""
    result = quantize_weight(W, H, settings)
    codes, scales, zeros, groups, loss = slow_gptq(
        W.numpy(),
        H.numpy(),
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        damp=settings.damp_percent,
        order=settings.order,
        scale_type=settings.scale_type,
        shares=shares,
    )
    np.testing.assert_array_equal(result.weight.codes, codes)
    np.testing.assert_array_equal(result.weight.scales.astype(np.float64), scales)
    np.testing.assert_array_equal(result.weight.zeros, zeros)
    np.testing.assert_array_equal(result.weight.g_idx, groups)
    assert float(result.losses.sum()) == pytest.approx(loss, rel=1e-9)
    assert result.weight.ordered == (settings.order != "dynamic" or scales.shape[1] == 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(48, 16), (48, -1), (144, 36), (144, 144)])
def test_codes_equal_those_of_the_textbook_that_inverts_at_every_column(
    order: Order, symmetric: bool, columns: int, group_size: int
) -> None:
    W, H = weights(4, columns, 4), correlated(columns, columns)
    settings = GptqSettings(group_size=group_size, symmetric=symmetric, order=order, scale_search=1)
    require_textbook(W, H, settings)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_searched_with_what_an_error_costs_in_the_end(
    order: Order, symmetric: bool
) -> None:
    settings = GptqSettings(group_size=16, symmetric=symmetric, order=order, scale_search=5)
    W, H = weights(4, 48, 4), correlated(48, 48)
    require_textbook(W, H, settings, shares=(1.0, 0.9, 0.8, 0.7, 0.6))


@pytest.mark.parametrize("order", ["dynamic", "group"])
def test_groups_that_fill_more_than_one_block_equal_those_of_the_textbook(order: Order) -> None:
    settings = GptqSettings(group_size=138, order=order, scale_search=1)
    require_textbook(weights(2, 276, 4), correlated(276, 276), settings)


@pytest.mark.parametrize("scale_type", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_scale_type_is_that_of_the_textbook(
    bits: int, scale_type: Literal["float16", "bfloat16", "float32"]
) -> None:
    W, H = weights(4, 64, bits) * 0.37, correlated(64, 40)
    for symmetric in (True, False):
        settings = GptqSettings(
            bits=bits,
            group_size=16,
            symmetric=symmetric,
            scale_type=scale_type,
            scale_search=1,
        )
        require_textbook(W, H, settings)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_gptaq_equals_least_squares_over_the_samples_at_every_column(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(160, 160, generator=generator, dtype=torch.float64)
    X = torch.randn(300, 160, generator=generator, dtype=torch.float64)
    X = X @ (torch.eye(160, dtype=torch.float64) + 0.3 * mixing)
    Y = X + 0.5 * torch.randn(300, 160, generator=generator, dtype=torch.float64)
    W = weights(4, 160, 6)
    monkeypatch.setattr(gptq, "_ASYMMETRY", share)
    settings = GptqSettings(group_size=32, order="none", scale_search=1, method="gptaq")
    H, C = X.T @ X / 300, (Y - X).T @ X / 300
    found = quantize_weight(W, H, settings, C).weight
    codes, scales = slow_gptaq(
        W.numpy(), X.numpy(), Y.numpy(), group_size=32, damp=0.01, share=share
    )
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scales.astype(np.float64), scales)
    plain = quantize_weight(W, H, settings).weight
    assert (plain.codes != found.codes).mean() > 0.05


def test_rows_that_do_not_fit_at_once_are_walked_like_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W, H = weights(7, 64, 3), correlated(64, 3)
    settings = GptqSettings(group_size=16)
    whole = quantize_weight(W, H, settings)
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 3)
    parts = quantize_weight(W, H, settings)
    np.testing.assert_array_equal(whole.weight.codes, parts.weight.codes)
    np.testing.assert_array_equal(whole.weight.scales, parts.weight.scales)
    torch.testing.assert_close(whole.losses, parts.losses)


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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_outputs_change_less_than_by_plain_rounding(order: Order, bits: int) -> None:
    W, H = weights(32, 128, 7), correlated(128, 7)
    settings = GptqSettings(bits=bits, group_size=32, order=order, scale_search=1)
    found = quantize_weight(W, H, settings).weight.dequantize()
    plain = round_weight(W, RoundingSettings(bits=bits, group_size=32)).dequantize()
    assert output_error(W, found, H) < 0.7 * output_error(W, plain, H)


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
    for order in ORDERS:
        settings = GptqSettings(group_size=16, order=order, scale_search=1)
        result = quantize_weight(W, H, settings)
        assert result.dead_columns == 2
        assert (result.weight.codes[:, dead] == 8).all()
        assert (result.weight.dequantize()[:, dead] == 0).all()
        require_textbook(W, H, settings)


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


@pytest.mark.parametrize("columns", [40, 600])
def test_the_factor_in_place_is_that_of_the_damped_matrix(columns: int) -> None:
    H = correlated(columns, 16)
    factor = H.clone()
    assert damped_factor(factor, 0.02) == 0.02
    damped = H + 0.02 * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(damped))
    assert torch.equal(factor.triu(1), H.triu(1))


def test_a_factor_that_fails_late_is_begun_again_from_what_was_there() -> None:
    H = correlated(600, 16)
    # The last input is nearly a copy of the one before it, but claims less than it must.
    H[-1, :-1] = H[:-1, -1] = H[-2, :-1]
    H[-1, -1] = 0.9 * H[-2, -2]
    factor = H.clone()
    damping = damped_factor(factor, 1e-4)
    assert damping > 1e-4
    damped = H + damping * H.diagonal().mean() * torch.eye(600, dtype=torch.float64)
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(damped))


def test_a_matrix_that_is_no_hessian_is_refused() -> None:
    with pytest.raises(ValueError, match="no Cholesky factor"):
        damped_factor(-torch.eye(3), 0.01)


def test_rearranging_moves_rows_and_columns_alike() -> None:
    A = torch.arange(9.0).reshape(3, 3)
    assert rearranged(A, torch.tensor([2, 0, 1])).tolist() == [[8, 6, 7], [2, 0, 1], [5, 3, 4]]
    A = torch.arange(700.0 * 700).reshape(700, 700)
    mirrored = A.clone()
    mirror_lower(mirrored)
    assert torch.equal(mirrored, A.tril() + A.tril(-1).T)


@pytest.mark.parametrize("order", ORDERS)
def test_columns_are_walked_in_the_order_of_the_textbook(order: Order) -> None:
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.randint(1, 9, (48,), generator=generator).double()
    assert column_order(diagonal, 16, order).tolist() == slow_order(diagonal.numpy(), 16, order)


def test_groups_with_large_inputs_go_first_and_stay_together() -> None:
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 3.0])
    assert column_order(diagonal, 2, "group").tolist() == [3, 2, 1, 0, 4, 5]
    assert column_order(diagonal, 2, "none").tolist() == [0, 1, 2, 3, 4, 5]
    assert column_order(diagonal, 2, "static").tolist() == [3, 1, 4, 5, 2, 0]


@pytest.mark.parametrize(
    ("columns", "group_size"), [(576, 64), (576, 96), (576, 192), (600, 200), (64, 1), (300, 300)]
)
def test_blocks_cover_every_column_from_the_last_on_and_never_cut_a_group_that_fits(
    columns: int, group_size: int
) -> None:
    runs = list(reversed_blocks(columns, group_size))
    walked = [column for start, end in runs for column in reversed(range(start, end))]
    assert walked == list(reversed(range(columns)))
    ends = {end for _, end in runs}
    for start, end in runs:
        assert end - start <= 128
        begun = [k for k in range(start, end) if (k + 1) % group_size == 0]
        # A group that begins inside a block ends in it, or begins with it.
        assert all(k + 1 - group_size >= start or k + 1 in ends for k in begun)


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
