"""Choose the grid of a group: the step between its codes and the code that stands for zero.

A group is a run of input columns of one row that shares a scale. Scales are rounded to the type
they are stored in before anything else looks at them, so that every later decision sees the numbers
that the model will run with.

Weights are held transposed here, as (K, N): the columns that GPTQ walks are then contiguous. N is
outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The smallest step that float16 can hold; a group of nearly nothing gets it.
_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = float(torch.finfo(torch.float16).max)

# A scale that cuts off a third of the range never won on a real model.
_LEAST_SHARE = 0.6


@dataclass(frozen=True)
class Grid:
    """The grids of one group in every row.

    Attributes:
        scales: Shape (N,), exact in float16.
        zeros: Shape (N,), whole numbers from 0 to 2**bits - 1.
        bits: Bits per code.
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    def encode(self, weights: Tensor) -> Tensor:
        """The nearest codes.

        Args:
            weights: Shape (..., N).

        Returns:
            Whole numbers from 0 to 2**bits - 1, in the type of the weights.
        """
        codes = torch.round(weights / self.scales) + self.zeros
        return codes.clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for.

        Args:
            codes: Shape (..., N).

        Returns:
            Shape (..., N).
        """
        return (codes - self.zeros) * self.scales


def covering_grid(weights: Tensor, bits: int, symmetric: bool, share: float = 1.0) -> Grid:
    """The grid that just covers a group, or a share of its range.

    Symmetric grids put the largest magnitude m half a step beyond the last code, with a scale of
    2 m / (2**bits - 1), as AutoGPTQ does. Asymmetric ones run from the least weight to the
    greatest, and always hold 0.

    Args:
        weights: Shape (g, N), one group of every row.
        bits: Bits per code.
        symmetric: Whether the zero is the middle code.
        share: Part of the range to cover, above 0; what lies outside is clipped.

    Returns:
        The grid.
    """
    steps = 2**bits - 1
    if symmetric:
        scales = _storable(weights.abs().amax(0) * (2 * share / steps))
        return Grid(scales, torch.full_like(scales, 2.0 ** (bits - 1)), bits)
    low, high = weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)
    scales = _storable((high - low) * (share / steps))
    return Grid(scales, torch.round(low * -share / scales).clamp_(0, steps), bits)


def best_grid(
    weights: Tensor, importance: Tensor, bits: int, symmetric: bool, candidates: int
) -> Grid:
    """The grid with the least weighted squared error among some that cover less and less.

    Args:
        weights: Shape (g, N), one group of every row.
        importance: Shape (g,), what a squared error in each column costs.
        bits: Bits per code.
        symmetric: Whether the zero is the middle code.
        candidates: How many grids are tried, at least 1; the first covers the whole group.

    Returns:
        For each row the best of the grids tried.
    """
    best = covering_grid(weights, bits, symmetric)
    if candidates == 1:
        return best
    least = _weighted_error(best, weights, importance)
    for share in torch.linspace(1, _LEAST_SHARE, candidates)[1:].tolist():
        grid = covering_grid(weights, bits, symmetric, share)
        error = _weighted_error(grid, weights, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales),
            torch.where(better, grid.zeros, best.zeros),
            bits,
        )
    return best


def _weighted_error(grid: Grid, weights: Tensor, importance: Tensor) -> Tensor:
    error = grid.decode(grid.encode(weights)).sub_(weights).square_()
    return importance @ error


def _storable(scales: Tensor) -> Tensor:
    """Scales as float16 will hold them."""
    kept = scales.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    return kept.to(scales.dtype)
