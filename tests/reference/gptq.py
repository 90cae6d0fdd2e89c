"""GPTQ as the paper tells it (sections 3.1 and 3.2), slowly: every inverse afresh.

Optimal Brain Quantization of all rows in one fixed order of columns. No factor, no blocks, no
sharing: one weight column is rounded, the rest move by the optimal update of equation 2, and the
inverse of the Hessian of what remains is computed from nothing, in float64.

GPTAQ likewise: with X what reaches the weight and Y what would reach it in the float model, each
time the columns to come are set to what makes the output of all columns nearest to that of the
float model, by least squares over the samples themselves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def slow_gptq(  # noqa: C901  (told in one piece)
    W: Floats,
    H: Floats,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    damp: float,
    order: str = "none",
    scale_type: str = "float16",
    shares: tuple[float, ...] = (1.0,),
) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8], NDArray[np.int64], float]:
    """Codes (N, K), scales and zeros (N, G), groups (K,), and the squared error over H's text.

    Of several ``shares`` of a group's range each row takes the one with the least squared error, an
    error in a column counting as much as it costs once the columns after it have made up for it.
    """
    W = W.copy()
    rows, columns = W.shape
    H = H.copy()
    dead = np.diag(H) == 0
    if dead.any():
        H[dead, dead] = np.diag(H)[~dead].mean()
    W[:, dead] = 0
    size = columns if group_size == -1 else group_size
    left = slow_order(np.diag(H), size, order)
    groups = np.arange(columns) // size
    if order == "dynamic":
        for step, column in enumerate(left):
            groups[column] = step // size
    H += damp * np.diag(H).mean() * np.eye(columns)
    costs = np.zeros(columns)
    for step, column in enumerate(left):
        costs[column] = 1 / np.linalg.inv(H[np.ix_(left[step:], left[step:])])[0, 0]
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.zeros((rows, columns // size))
    zeros = np.zeros((rows, columns // size), np.uint8)

    def choose(group: int) -> None:
        members = groups == group
        for row in range(rows):
            grids = [
                slow_grid(W[row, members], bits, symmetric, scale_type, share) for share in shares
            ]
            errors = [
                sum(
                    cost * (weight - (slow_code(weight, scale, zero, bits) - zero) * scale) ** 2
                    for weight, cost in zip(W[row, members], costs[members], strict=True)
                )
                for scale, zero in grids
            ]
            scales[row, group], zeros[row, group] = grids[int(np.argmin(errors))]

    started: set[int] = set()
    if order == "static":
        started = set(range(columns // size))
        for group in started:
            choose(group)
    start = W.copy()
    quantized = np.zeros_like(W)
    while left:
        k = left[0]
        group = int(groups[k])
        if group not in started:
            started.add(group)
            choose(group)
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        for row in range(rows):
            code = slow_code(W[row, k], scales[row, group], int(zeros[row, group]), bits)
            codes[row, k] = code
            quantized[row, k] = (code - int(zeros[row, group])) * scales[row, group]
            error = (W[row, k] - quantized[row, k]) / inverse[0, 0]
            W[row, left] -= error * inverse[0]
        left = left[1:]
    difference = start - quantized
    lost = float(np.trace(difference @ H @ difference.T))
    return codes, scales, zeros, groups, lost


def slow_gptaq(
    W: Floats, X: Floats, Y: Floats, *, group_size: int, damp: float, share: float
) -> tuple[NDArray[np.uint8], Floats]:
    """Codes and scales at 4 bits, symmetric, for inputs X and Y of shape (samples, K).

    The columns are walked in the order "none". ``share`` is how far X is to be moved towards Y.
    Damping is that of GPTQ: further samples, one for each column, in which it is the only input.
    """
    rows, columns = W.shape
    Y = X + share * (Y - X)
    weight = damp * np.diag(X.T @ X).mean()
    alone = np.sqrt(weight) * np.eye(columns)
    X, Y = np.vstack([X, alone]), np.vstack([Y, alone])
    codes = np.zeros(W.shape, np.uint8)
    scales = np.zeros((rows, columns // group_size))
    quantized = np.zeros_like(W)
    for k in range(columns):
        # What the columns that are done owe: their float output less their quantized one.
        owed = Y[:, :k] @ W[:, :k].T - X[:, :k] @ quantized[:, :k].T
        moved = W[:, k:] + np.linalg.lstsq(X[:, k:], owed, rcond=None)[0].T
        group = k // group_size
        for row in range(rows):
            if k % group_size == 0:
                scales[row, group], _ = slow_grid(moved[row, :group_size], 4, True)
            codes[row, k] = slow_code(moved[row, 0], scales[row, group], 8, 4)
            quantized[row, k] = (int(codes[row, k]) - 8) * scales[row, group]
    return codes, scales


def slow_order(diagonal: Floats, group_size: int, order: str) -> list[int]:
    """The columns in the order of the walk; ties from left to right."""
    columns = list(range(len(diagonal)))
    if order == "none":
        return columns
    if order in ("static", "dynamic"):
        return sorted(columns, key=lambda k: -diagonal[k])
    largest = [
        max(diagonal[first : first + group_size]) for first in range(0, len(diagonal), group_size)
    ]
    return sorted(
        columns, key=lambda k: (-largest[k // group_size], k // group_size, -diagonal[k], k)
    )


def slow_grid(
    weights: Floats,
    bits: int,
    symmetric: bool,
    scale_type: str = "float16",
    share: float = 1.0,
) -> tuple[float, int]:
    """Scale, as its type holds it, and zero of one group of one row."""
    steps = 2**bits - 1
    if symmetric:
        scale = stored(2 * share * np.abs(weights).max() / steps, scale_type)
        return scale, 2 ** (bits - 1)
    low, high = share * min(weights.min(), 0.0), share * max(weights.max(), 0.0)
    scale = stored((high - low) / steps, scale_type)
    return scale, int(min(max(np.round(-low / scale), 0), steps))


def slow_code(weight: float, scale: float, zero: int, bits: int) -> int:
    """The nearest code, ties to even."""
    return int(min(max(np.round(weight / scale) + zero, 0), 2**bits - 1))


def stored(scale: float, scale_type: str = "float16") -> float:
    """A scale after a stay in its type, never 0 there."""
    if scale_type == "float16":
        return float(np.float16(max(scale, 2.0**-24)))
    if scale_type == "float32":
        return float(np.float32(scale))
    # bfloat16 is the upper half of float32, rounded to even.
    word = int(np.float32(scale).view(np.uint32))
    word = (word + 0x7FFF + (word >> 16 & 1)) & 0xFFFF0000
    return float(np.uint32(word).view(np.float32))
