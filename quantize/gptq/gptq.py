"""GPTQ: round the columns of a weight one by one, and let the rest make up for each error.

Rounding a weight W to Q changes a layer's outputs by (W - Q) x. GPTQ (Frantar et al., 2022,
https://arxiv.org/abs/2210.17323) makes that small on the inputs x of calibration text: it minimises
tr((W - Q) H (W - Q)^T) with H the mean of x x^T. It walks the columns in a fixed order, and before
each is rounded, all columns still to come have moved to where they best cancel the errors so far.

The paper moves them after every column, which takes the factor of an inverse. They need not move at
all. With d the columns done, r those to come, and e = W - Q the error of the columns done, the
columns to come would best be W_r + H_rr^-1 H_rd e_d. Let H = L L^T with the columns in the reverse
order of the walk, so that those to come lie first; then that is W_r + x with L_rr^T x = L_dr^T e_d.
The column k that comes next is the last of r, so that

    x_k = sum over d of L_dk e_d / L_kk

This is Babai's nearest plane (Chen et al., 2025, https://arxiv.org/abs/2507.18553): one Cholesky
factor and no inverse, 1/3 K^3 instead of K^3 multiplications, in the memory of one K x K matrix.
Rows of W do not touch one another and are walked a few thousand at once.

What is added to the paper: scales are rounded to the type they are stored in before the walk, so
that the error that is made up for is the one that will be there; and they are searched with the
cost L_kk^2 of an error in each column.

GPTAQ (Li et al., 2025, https://arxiv.org/abs/2504.02692) also lets the columns to come make up for
what earlier layers changed: the inputs are x where the float model had x + dx. With C the mean of
dx x^T, the columns to come take C_dr^T W_d on themselves as well, which adds the sum over d of
Z_kd W_d / L_kk to x_k, where L Z = C^T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mistill.pytorch.factor import damped_factor, rearranged
from mistill.weights.gptq_layout import QuantizedWeight
from mistill.weights.grid import Grid, GridKind, best_grid
from quantize.settings import GptqSettings

# Columns whose errors are held back and handed to the rest in one matrix product.
_BLOCK = 128

# Rows that are walked at once: enough to keep a processor busy, few enough for its cache.
ROWS_AT_ONCE = 4096

# How much of what earlier layers changed GPTAQ makes up for. The paper takes all of it,
# gptqmodel a quarter, which was better here too (docs/experiments.md).
_ASYMMETRY = 0.25


@dataclass(frozen=True)
class GptqResult:
    """A quantized weight and what it cost.

    Attributes:
        weight: The codes.
        losses: Shape (N,), the mean squared error of each output on the calibration text, plus what
            the damping adds to it. Of GPTAQ, against the outputs that it aims at on the way.
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
            weight = replace(
                self.weight,
                codes=self.weight.codes[rows],
                scales=self.weight.scales[rows],
                zeros=self.weight.zeros[rows],
            )
            parts.append(replace(self, weight=weight, losses=self.losses[rows]))
            start += size
        return parts


@dataclass(frozen=True)
class Walk:
    """The order of the columns and the factor of the Hessian, the same for all weights of a stage.

    Attributes:
        columns: Shape (K,), the columns in the reverse order of the walk.
        L: Shape (K, K), the Cholesky factor of H in that order, in the lower triangle.
        dead: Shape (K,), True where an input was always zero.
        damping: Share of the mean diagonal that was added to H.
        Z: For GPTAQ, shape (K, K); else None.
    """

    columns: Tensor
    L: Tensor
    dead: Tensor
    damping: float
    Z: Tensor | None = None


def quantize_weight(
    W: Tensor, H: Tensor, settings: GptqSettings, C: Tensor | None = None
) -> GptqResult:
    """Quantize a weight so that its outputs on the calibration text change least.

    Rows do not touch one another, so weights that share their inputs can be stacked and walked at
    once. Everything is computed in the type of the tensors given, float32 or better.

    Args:
        W: Shape (N, K).
        H: Shape (K, K), the mean of x x^T over the inputs x of calibration text; symmetric.
        settings: How to quantize.
        C: For GPTAQ, shape (K, K), the mean of (y - x) x^T, with y what the float model has for x.

    Returns:
        The codes and the error.

    Raises:
        ValueError: If the group size does not divide K or the shapes do not fit.
    """
    columns = W.shape[1]
    if H.shape != (columns, columns):
        raise ValueError(f"a weight {tuple(W.shape)} needs H of {columns} columns: {H.shape}")
    return walk_weight(W, make_walk(H, settings, C), settings)


def make_walk(H: Tensor, settings: GptqSettings, C: Tensor | None = None) -> Walk:
    """Order the columns, and factor the Hessian in that order.

    Args:
        H: Shape (K, K), the mean of x x^T; symmetric.
        settings: The order, the damping, and where whole groups are walked their size.
        C: For GPTAQ, shape (K, K), the mean of (y - x) x^T.

    Returns:
        What holds for all weights with these inputs.

    Raises:
        ValueError: If the group size does not divide K.
    """
    size = group_columns(len(H), settings.group_size)
    diagonal = H.diagonal().clone()
    dead = diagonal == 0
    # An input that was always zero gets the diagonal of an average one, so that H has a factor.
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    columns = column_order(diagonal, size, settings.order).flip(0)
    L = rearranged(H, columns)
    L.diagonal().copy_(diagonal[columns])
    damping = damped_factor(L, settings.damp_percent)
    if C is None:
        return Walk(columns, L, dead, damping)
    Z = rearranged(C, columns).T.mul_(_ASYMMETRY)
    return Walk(columns, L, dead, damping, torch.linalg.solve_triangular(L, Z, upper=False))


def walk_weight(W: Tensor, walk: Walk, settings: GptqSettings) -> GptqResult:
    """Quantize a weight along a walk that was made for its inputs.

    Args:
        W: Shape (N, K).
        walk: Order and factor, made with the same settings.
        settings: How to quantize.

    Returns:
        The codes and the error.
    """
    outputs, columns = W.shape
    size = group_columns(columns, settings.group_size)
    codes = np.empty((outputs, columns), np.uint8)
    scale_dtype = np.float16 if settings.scale_type == "float16" else np.float32
    scales = np.empty((outputs, columns // size), scale_dtype)
    zeros = np.empty((outputs, columns // size), np.uint8)
    losses = torch.empty(outputs, dtype=W.dtype)
    back = torch.empty_like(walk.columns)
    back[walk.columns] = torch.arange(columns)
    for start in range(0, outputs, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        walked = _Rows(W[rows], walk, settings)
        losses[rows] = walked.losses
        codes[rows] = walked.codes[back].T.numpy()
        for group, grid in enumerate(walked.grids):
            scales[rows, group] = grid.scales.numpy()
            zeros[rows, group] = grid.zeros.numpy()
    g_idx = np.arange(columns) // size
    if settings.order == "dynamic":
        g_idx = (columns - 1 - back.numpy()) // size
    weight = QuantizedWeight(
        codes,
        scales,
        zeros,
        g_idx.astype(np.int32),
        settings.bits,
        settings.group_size,
        settings.scale_type,
    )
    return GptqResult(weight, losses, walk.damping, int(walk.dead.sum()))


class _Rows:
    """Some rows of a weight on their walk.

    All tensors have the columns in the reverse order of the walk: what is done lies after ``end``.
    """

    def __init__(self, W: Tensor, walk: Walk, settings: GptqSettings) -> None:
        """Walk all columns."""
        outputs, columns = W.shape
        self._L = walk.L
        self._size = group_columns(columns, settings.group_size)
        self._search = settings.scale_search
        self._kind = GridKind(
            bits=settings.bits, symmetric=settings.symmetric, scale_type=settings.scale_type
        )
        # What an error in a column costs when the columns to come have made up for it.
        self._costs = walk.L.diagonal().square()
        # The columns to come as they were, and the errors of those done.
        self._E = W.T[walk.columns].contiguous()
        self._E[walk.dead[walk.columns]] = 0
        self._W = None if walk.Z is None else self._E.clone()
        self._Z = walk.Z
        self.codes = torch.empty(columns, outputs, dtype=torch.uint8)
        self.losses = torch.zeros(outputs, dtype=W.dtype)
        self.grids: list[Grid] = []
        self._grids: dict[int, Grid] = {}
        self._groups = walk.columns // self._size
        if settings.order == "dynamic":
            self._groups = torch.arange(columns - 1, -1, -1) // self._size
        if settings.order == "static":
            for group in range(columns // self._size):
                members = (self._groups == group).nonzero()[:, 0]
                self._grids[group] = self._search_grid(self._E[members], self._costs[members])
        for start, end in reversed_blocks(columns, self._size):
            self._walk_block(start, end)
        self.grids = [self._grids[group] for group in range(columns // self._size)]

    def _walk_block(self, start: int, end: int) -> None:
        pulls = self._pull(slice(start, end), end)
        # Row k holds what the columns of the block that are done pull column k by.
        inside = self._L[start:end, start:end].T.contiguous()
        for k in range(end - 1, start - 1, -1):
            group = int(self._groups[k])
            if group not in self._grids:
                self._grids[group] = self._fresh_grid(slice(k + 1 - self._size, k + 1))
            grid = self._grids[group]
            pull = pulls[k - start]
            pull.addmv_(self._E[k + 1 : end].T, inside[k - start, k + 1 - start :])
            if self._W is not None and self._Z is not None:
                pull.addmv_(self._W[k + 1 : end].T, self._Z[k, k + 1 : end])
            length = self._L[k, k]
            moved = self._E[k] + pull / length
            code = grid.encode(moved)
            self.codes[k] = code
            rounded = grid.decode(code)
            self._E[k] -= rounded
            self.losses += moved.sub_(rounded).mul_(length).square_()

    def _pull(self, columns: slice, end: int) -> Tensor:
        """What the columns done from ``end`` on pull some columns by, shape (columns, N)."""
        pulls = self._L[end:, columns].T @ self._E[end:]
        if self._W is not None and self._Z is not None:
            pulls.addmm_(self._Z[columns, end:], self._W[end:])
        return pulls

    def _fresh_grid(self, group: slice) -> Grid:
        """The grid of the group that comes next, from its weights as they would best be now."""
        weights = self._E[group]
        if group.stop < len(self._E):
            pulls = self._pull(group, group.stop)
            corner = self._L[group, group]
            weights = weights + torch.linalg.solve_triangular(corner.T, pulls, upper=True)
        return self._search_grid(weights, self._costs[group])

    def _search_grid(self, weights: Tensor, costs: Tensor) -> Grid:
        return best_grid(weights, costs, self._kind, self._search)


def group_columns(columns: int, group_size: int) -> int:
    """Number of columns that share a scale.

    Args:
        columns: Columns of the weight, K.
        group_size: The setting, -1 for all of them.

    Returns:
        From 1 to K.

    Raises:
        ValueError: If groups do not divide the columns.
    """
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise ValueError(f"groups of {size} do not divide {columns} columns")
    return size


def column_order(diagonal: Tensor, group_size: int, order: str) -> Tensor:
    """In which order the columns are walked.

    Columns with large inputs do best early, while there are many others left to make up for their
    errors (the "act-order" of the authors' code). Walking whole groups, and columns within their
    group, allows scales to be chosen on the way without an index from column to group.

    Args:
        diagonal: Shape (K,), the mean square of each input.
        group_size: Columns per group.
        order: "none", "group", or for the columns one by one "static" or "dynamic".

    Returns:
        Shape (K,), the columns in the order of the walk.
    """
    if order == "none":
        return torch.arange(len(diagonal))
    if order != "group":
        return diagonal.argsort(descending=True, stable=True)
    by_group = diagonal.reshape(-1, group_size)
    inside = by_group.argsort(dim=1, descending=True, stable=True)
    groups = by_group.amax(1).argsort(descending=True, stable=True)
    columns = inside + torch.arange(len(by_group))[:, None] * group_size
    return columns[groups].reshape(-1)


def reversed_blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Cut the columns, from the last to the first, into runs that hold whole groups or part of one.

    Args:
        columns: Number of columns.
        group_size: Columns per group; divides them.

    Yields:
        Start and end of each run.
    """
    period = max(1, _BLOCK // group_size) * group_size
    for last in range(columns, 0, -period):
        first = max(last - period, 0)
        for end in range(last, first, -_BLOCK):
            yield max(end - _BLOCK, first), end
