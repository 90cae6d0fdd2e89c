"""Choose the grid of a group: its scale, the step between two codes, and its zero point.

A group is some input columns of one row that share a scale. Scales are rounded to the type they
are stored in before anything else looks at them, so that every later decision sees the numbers
that the model will run with.

Weights are held transposed here, as (K, N): the columns that GPTQ walks are then contiguous. N is
outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mistill.weights.gptq_layout import ScaleType

# The smallest step that each type can hold; a group of nearly nothing gets it.
_SMALLEST_SCALE = {
    "float16": 2.0**-24,
    "bfloat16": torch.finfo(torch.bfloat16).tiny,
    "float32": torch.finfo(torch.float32).tiny,
}
_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# A scale that cuts off more than this of the range never won on a real model. With few codes it
# pays to give up more of the range.
_LEAST_SHARE = {2: 0.4, 3: 0.5, 4: 0.6, 8: 0.6}


@dataclass(frozen=True, kw_only=True)
class GridKind:
    """What all grids of a weight share.

    Attributes:
        bits: Bits per code.
        symmetric: Whether the zero point is the middle code.
        scale_type: The type that scales are stored in.
    """

    bits: int
    symmetric: bool
    scale_type: ScaleType = "float16"


@dataclass(frozen=True)
class Grid:
    """The grids of one group in every row.

    Attributes:
        scales: Shape (N,), exact in the type they are stored in.
        zeros: Shape (N,), zero points, whole numbers from 0 to 2**bits - 1.
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
        codes = (weights / self.scales).round_().add_(self.zeros)
        return codes.clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for.

        Args:
            codes: Shape (..., N).

        Returns:
            Shape (..., N).
        """
        return (codes - self.zeros).mul_(self.scales)


def best_grid(weights: Tensor, importance: Tensor, kind: GridKind, candidates: int) -> Grid:
    """The grid with the least weighted squared error among some that cover less and less.

    Args:
        weights: Shape (g, N), one group of every row.
        importance: Shape (g,), what a squared error in each column costs.
        kind: Bits, symmetry and scale type.
        candidates: How many grids are tried, at least 1; the first covers the whole group.

    Returns:
        For each row the best of the grids tried.
    """
    low, high = _range(weights, kind)
    best = _covering(low, high, kind, 1.0)
    if candidates == 1:
        return best
    least = _weighted_error(best, weights, importance)
    for share in torch.linspace(1, _LEAST_SHARE[kind.bits], candidates)[1:].tolist():
        grid = _covering(low, high, kind, share)
        error = _weighted_error(grid, weights, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales),
            torch.where(better, grid.zeros, best.zeros),
            kind.bits,
        )
    return best


def _range(weights: Tensor, kind: GridKind) -> tuple[Tensor, Tensor]:
    """What a grid has to cover in each row, (N,) and (N,); it always holds 0."""
    if kind.symmetric:
        largest = weights.abs().amax(0)
        return -largest, largest
    return weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)


def _covering(low: Tensor, high: Tensor, kind: GridKind, share: float) -> Grid:
    """The grid that covers a share of a range; what lies outside is clipped.

    Symmetric grids put the largest magnitude m half a step beyond the last code, with a scale of
    2 m / (2**bits - 1), as AutoGPTQ does. Asymmetric ones run from the least weight to the
    greatest.
    """
    steps = 2**kind.bits - 1
    smallest = _SMALLEST_SCALE[kind.scale_type]
    largest = torch.finfo(_TYPES[kind.scale_type]).max
    scales = ((high - low) * (share / steps)).clamp_(smallest, largest)
    scales = scales.to(_TYPES[kind.scale_type]).to(low.dtype)
    if kind.symmetric:
        return Grid(scales, torch.full_like(scales, 2.0 ** (kind.bits - 1)), kind.bits)
    return Grid(scales, torch.round(low * -share / scales).clamp_(0, steps), kind.bits)


def _weighted_error(grid: Grid, weights: Tensor, importance: Tensor) -> Tensor:
    error = grid.decode(grid.encode(weights)).sub_(weights).square_()
    return importance @ error
