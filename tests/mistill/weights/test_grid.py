from __future__ import annotations

import numpy as np
import pytest
import torch

from mistill.weights.gptq_layout import ScaleType
from mistill.weights.grid import Grid, GridKind, best_grid
from tests.reference.gptq import slow_code, slow_grid


def groups(seed: int, columns: int = 24, outputs: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, outputs, generator=generator, dtype=torch.float64)


def covering_grid(weights: torch.Tensor, kind: GridKind) -> Grid:
    """The grid that just covers each group: the only one that is tried."""
    return best_grid(weights, weights.new_ones(len(weights)), kind, candidates=1)


FOUR = GridKind(bits=4, symmetric=True)
SKEWED = GridKind(bits=4, symmetric=False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_and_codes_equal_those_worked_one_by_one(bits: int, symmetric: bool) -> None:
    weights = groups(1)
    weights[:, 0].abs_()
    weights[:, 1].abs_().neg_()
    grid = covering_grid(weights, GridKind(bits=bits, symmetric=symmetric))
    codes = grid.encode(weights)
    for row in range(weights.shape[1]):
        scale, zero = slow_grid(weights[:, row].numpy(), bits, symmetric)
        assert [float(grid.scales[row]), float(grid.zeros[row])] == [scale, zero]
        expected = [slow_code(weight, scale, zero, bits) for weight in weights[:, row].tolist()]
        assert codes[:, row].tolist() == expected


def test_an_asymmetric_grid_moves_no_weight_by_more_than_half_a_step_and_a_bit() -> None:
    weights = groups(2)
    grid = covering_grid(weights, SKEWED)
    moved = (grid.decode(grid.encode(weights)) - weights).abs()
    # The zero is a whole code, so an end of the range may lie up to half a step beyond the codes.
    assert (moved <= 1.01 * grid.scales).all()
    assert (moved.median(0).values <= 0.5 * grid.scales).all()


@pytest.mark.parametrize(
    ("scale_type", "stored"),
    [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
def test_scales_survive_the_type_they_are_stored_in(
    scale_type: ScaleType, stored: torch.dtype
) -> None:
    for symmetric in (True, False):
        kind = GridKind(bits=8, symmetric=symmetric, scale_type=scale_type)
        scales = best_grid(groups(3), torch.ones(24).double(), kind, 5).scales
        assert torch.equal(scales, scales.to(stored).double())


def test_a_scale_is_never_zero_nor_infinite() -> None:
    weights = torch.tensor([[0.0, 1e-12, 1e9]])
    assert covering_grid(weights, FOUR).scales.tolist() == [2.0**-24, 2.0**-24, 65504.0]
    for scale_type in ("bfloat16", "float32"):
        kind = GridKind(bits=4, symmetric=True, scale_type=scale_type)
        scales = covering_grid(weights, kind).scales
        assert scales[0] == torch.finfo(torch.float32).tiny
        torch.testing.assert_close(scales[1:], weights[0, 1:] * 2 / 15, rtol=2**-8, atol=0)


def test_the_search_finds_the_best_of_the_grids_it_names() -> None:
    weights = groups(4)
    weights[0] *= 3
    importance = torch.rand(24, generator=torch.Generator().manual_seed(4)).double() * 5
    found = best_grid(weights, importance, FOUR, candidates=9)
    for row in range(12):
        shares = [1 - 0.4 * number / 8 for number in range(9)]
        column = weights[:, row].numpy()
        errors, scales = [], []
        for share in shares:
            scale, zero = slow_grid(column, 4, symmetric=True, share=share)
            codes = np.array([slow_code(weight, scale, zero, 4) for weight in column.tolist()])
            errors.append((importance.numpy() * (column - scale * (codes - zero)) ** 2).sum())
            scales.append(scale)
        assert float(found.scales[row]) == scales[int(np.argmin(errors))]


def test_columns_that_cost_more_are_fitted_better() -> None:
    weights = groups(5, columns=32, outputs=200)
    weights[0] = 6
    outlier, rest = torch.zeros(32).double(), torch.ones(32).double()
    outlier[0], rest[0] = 1, 0
    for_outlier = best_grid(weights, outlier, FOUR, candidates=16)
    for_rest = best_grid(weights, rest, FOUR, candidates=16)
    assert (for_rest.scales < for_outlier.scales).double().mean() > 0.9
