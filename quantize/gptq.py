"""GPTQ: round the columns of a weight one by one, and let the rest make up for each error.

Rounding a weight W to Q changes a layer's outputs by (W - Q) x. GPTQ (Frantar et al., 2022,
https://arxiv.org/abs/2210.17323) makes that small on the inputs x of calibration text: it minimises
tr((W - Q) H (W - Q)^T) with H the mean of x x^T. It walks the columns in a fixed order; when column
k has been rounded, the columns still to come move by the amount that best cancels its error,

    W[:, k+1:] -= (W[:, k] - Q[:, k]) / d * [H_k^-1]_{k, k+1:}        d = [H_k^-1]_kk

where H_k is the Hessian of the columns from k on. Those inverses need not be computed one after
another: if H^-1 = U^T U with U upper triangular, then row k of U is [H_k^-1]_{k, k:} / sqrt(d), for
every k. All the inverses are in one factor (section 3.3, step 3).

What is added to the paper: scales are rounded to float16 before the walk, so that the error that is
made up for is the one that will be there; a group's scale is chosen from the weights as they are
when the walk reaches it; groups with large inputs go first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mistill.gptq_layout import QuantizedWeight
from quantize.grid import best_grid, covering_grid
from quantize.settings import GptqSettings, RoundingSettings

# Columns whose errors are held back and handed to the rest in one matrix product.
_BLOCK = 128


@dataclass(frozen=True)
class GptqResult:
    """A quantized weight and what it cost.

    Attributes:
        weight: The codes.
        losses: Shape (N,), the mean squared error of each output on the calibration text, plus what
            the damping adds to it.
        damping: Share of the Hessian's mean diagonal that was added to it.
        dead_columns: Inputs that were zero on all of the calibration text.
    """

    weight: QuantizedWeight
    losses: Tensor
    damping: float
    dead_columns: int

    def split(self, outputs: Sequence[int]) -> list[GptqResult]:
        """Take apart what was stacked because it shares its inputs.

        Args:
            outputs: Rows of each part, in order.

        Returns:
            One result per part.
        """
        parts, start = [], 0
        for size in outputs:
            rows = slice(start, start + size)
            weight = QuantizedWeight(
                self.weight.codes[rows],
                self.weight.scales[rows],
                self.weight.zeros[rows],
                self.weight.g_idx,
                self.weight.bits,
                self.weight.group_size,
            )
            parts.append(GptqResult(weight, self.losses[rows], self.damping, self.dead_columns))
            start += size
        return parts


def quantize_weight(W: Tensor, H: Tensor, settings: GptqSettings) -> GptqResult:
    """Quantize a weight so that its outputs on the calibration text change least.

    Rows do not touch one another, so weights that share their inputs can be stacked and walked at
    once. Everything is computed in the type of the tensors given, float32 or better.

    Args:
        W: Shape (N, K).
        H: Shape (K, K), the mean of x x^T over the inputs x of calibration text; symmetric.
        settings: How to quantize.

    Returns:
        The codes and the error.

    Raises:
        ValueError: If the group size does not divide K or the shapes do not fit.
    """
    outputs, columns = W.shape
    if H.shape != (columns, columns):
        raise ValueError(f"a weight {tuple(W.shape)} needs H of {columns} columns: {H.shape}")
    size = columns if settings.group_size == -1 else settings.group_size
    if columns % size:
        raise ValueError(f"groups of {size} do not divide {columns} columns")
    H, dead = _revive(H)
    order = column_order(H.diagonal(), size, settings.order)
    U, damping = inverse_factor(H[order][:, order], settings.damp_percent)
    V = W.T[order].contiguous()
    V[dead[order]] = 0

    codes = torch.empty(columns, outputs, dtype=torch.uint8)
    scales = torch.empty(columns // size, outputs, dtype=torch.float16)
    zeros = torch.empty(columns // size, outputs, dtype=torch.uint8)
    losses = torch.zeros(outputs, dtype=W.dtype)
    # An error in column k, once the rest has made up for it, costs its square over this.
    spread = U.diagonal().square()
    for start, end in blocks(columns, size):
        errors = torch.empty(end - start, outputs, dtype=W.dtype)
        for k in range(start, end):
            if k % size == 0:
                group = slice(k, k + size)
                grid = best_grid(
                    V[group],
                    spread[group].reciprocal(),
                    settings.bits,
                    settings.symmetric,
                    settings.scale_search,
                )
                # Groups may be walked out of turn, but each keeps its own columns.
                place = int(order[k]) // size
                scales[place], zeros[place] = grid.scales, grid.zeros
            code = grid.encode(V[k])
            codes[k] = code
            error = errors[k - start]
            torch.sub(V[k], grid.decode(code), out=error)
            error /= U[k, k]
            V[k + 1 : end].addr_(U[k, k + 1 : end], error, alpha=-1)
            losses += error.square()
        V[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)

    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return GptqResult(
        _quantized(in_place, scales, zeros, settings),
        losses,
        damping,
        int(dead.sum()),
    )


def round_weight(W: Tensor, settings: RoundingSettings) -> QuantizedWeight:
    """Round every weight to the nearest code of the grid that just covers its group.

    Args:
        W: Shape (N, K), float32 or better.
        settings: How to round; the group size divides K.

    Returns:
        The codes.
    """
    outputs, columns = W.shape
    size = columns if settings.group_size == -1 else settings.group_size
    groups = columns // size
    # Every group of every row is a row of its own here: (g, N * G).
    rows = W.reshape(outputs * groups, size).T
    grid = covering_grid(rows, settings.bits, settings.symmetric)
    codes = grid.encode(rows).T.reshape(outputs, columns).to(torch.uint8)
    return _quantized(
        codes.T,
        grid.scales.reshape(outputs, groups).T.to(torch.float16),
        grid.zeros.reshape(outputs, groups).T.to(torch.uint8),
        settings,
    )


def inverse_factor(H: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """The upper triangular U with U^T U the inverse of the damped H.

    With the order of rows and columns reversed, a Cholesky factor of H is upper triangular,
    H = R R^T, and its inverse is U. That takes one factorization and one triangular solve, half the
    work of inverting H and factoring the inverse, and loses half as many digits.

    Args:
        H: Shape (K, K), symmetric, its diagonal above 0.
        damp_percent: Share of the mean diagonal to add to the diagonal, at first.

    Returns:
        U, and the share that was added in the end.

    Raises:
        ValueError: If H cannot be factored with all its mean diagonal added.
    """
    identity = torch.eye(len(H), dtype=H.dtype)
    mean = H.diagonal().mean()
    damping = damp_percent
    while True:
        reversed_H = H.flip(0, 1)
        reversed_H.diagonal().add_(damping * mean)
        L, failed_at = torch.linalg.cholesky_ex(reversed_H)
        if not failed_at:
            R = L.flip(0, 1)
            return torch.linalg.solve_triangular(R, identity, upper=True), damping
        if damping >= 1:
            raise ValueError("H is not a mean of x x^T: it has no Cholesky factor when damped")
        damping = min(1.0, 2 * damping)


def column_order(diagonal: Tensor, group_size: int, order: str) -> Tensor:
    """In which order the columns are walked.

    Columns with large inputs do best early, while there are many others left to make up for their
    errors (the "act-order" of the authors' code). Whole groups move, and columns within
    their group, so that the stored codes need no index from column to group.

    Args:
        diagonal: Shape (K,), the mean square of each input.
        group_size: Columns per group.
        order: "none" or "group".

    Returns:
        Shape (K,), the columns in the order of the walk.
    """
    if order == "none":
        return torch.arange(len(diagonal))
    by_group = diagonal.reshape(-1, group_size)
    inside = by_group.argsort(dim=1, descending=True, stable=True)
    groups = by_group.amax(1).argsort(descending=True, stable=True)
    columns = inside + torch.arange(len(by_group))[:, None] * group_size
    return columns[groups].reshape(-1)


def blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Cut the columns into runs that start wherever a group starts, or hold whole groups.

    Args:
        columns: Number of columns.
        group_size: Columns per group; divides them.

    Yields:
        Start and end of each run.
    """
    period = max(1, _BLOCK // group_size) * group_size
    for first in range(0, columns, period):
        last = min(first + period, columns)
        for start in range(first, last, _BLOCK):
            yield start, min(start + _BLOCK, last)


def _revive(H: Tensor) -> tuple[Tensor, Tensor]:
    """Give inputs that were always zero the diagonal of an average one, so that H has a factor."""
    diagonal = H.diagonal()
    dead = diagonal == 0
    if not dead.any():
        return H, dead
    H = H.clone()
    H.diagonal()[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    return H, dead


def _quantized(
    codes: Tensor, scales: Tensor, zeros: Tensor, settings: GptqSettings | RoundingSettings
) -> QuantizedWeight:
    """Hand (K, N) codes and (G, N) grids over as the (N, K) and (N, G) that storage keeps."""
    columns, groups = len(codes), len(scales)
    g_idx = np.arange(columns, dtype=np.int32) // np.int32(columns // groups)

    def turned(tensor: Tensor) -> np.ndarray:
        return np.ascontiguousarray(tensor.T.numpy())

    return QuantizedWeight(
        turned(codes),
        turned(scales),
        turned(zeros),
        g_idx,
        settings.bits,
        settings.group_size,
    )
