"""GPTQ as the paper tells it (sections 3.1 and 3.2), slowly: every inverse afresh.

Optimal Brain Quantization of all rows in one fixed order of columns. No factor, no blocks, no
sharing: one weight column is rounded, the rest move by the optimal update of equation 2, and the
inverse of the Hessian of what remains is computed from nothing, in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def slow_gptq(
    W: Floats,
    H: Floats,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    damp: float,
    order: list[int] | None = None,
) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8], float]:
    """Codes (N, K), scales and zeros (N, G), and the sum of squared errors over H's text."""
    W = W.copy()
    rows, columns = W.shape
    H = H.copy()
    dead = np.diag(H) == 0
    if dead.any():
        H[dead, dead] = np.diag(H)[~dead].mean()
    W[:, dead] = 0
    H += damp * np.diag(H).mean() * np.eye(columns)
    size = columns if group_size == -1 else group_size
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.zeros((rows, columns // size))
    zeros = np.zeros((rows, columns // size), np.uint8)
    left = list(range(columns)) if order is None else list(order)
    started: set[int] = set()
    start = W.copy()
    quantized = np.zeros_like(W)
    while left:
        k = left[0]
        group = k // size
        members = slice(group * size, (group + 1) * size)
        if group not in started:
            started.add(group)
            for row in range(rows):
                scales[row, group], zeros[row, group] = slow_grid(W[row, members], bits, symmetric)
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        for row in range(rows):
            code = slow_code(W[row, k], scales[row, group], int(zeros[row, group]), bits)
            codes[row, k] = code
            quantized[row, k] = (code - int(zeros[row, group])) * scales[row, group]
            error = (W[row, k] - quantized[row, k]) / inverse[0, 0]
            W[row, left] -= error * inverse[0]
        left = left[1:]
    start[:, dead] = 0
    difference = start - quantized
    return codes, scales, zeros, float(np.trace(difference @ H @ difference.T))


def slow_grid(weights: Floats, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale, as float16 holds it, and zero of one group of one row."""
    steps = 2**bits - 1
    if symmetric:
        scale = stored(2 * np.abs(weights).max() / steps)
        return scale, 2 ** (bits - 1)
    low, high = min(weights.min(), 0.0), max(weights.max(), 0.0)
    scale = stored((high - low) / steps)
    return scale, int(min(max(np.round(-low / scale), 0), steps))


def slow_code(weight: float, scale: float, zero: int, bits: int) -> int:
    """The nearest code, ties to even."""
    return int(min(max(np.round(weight / scale) + zero, 0), 2**bits - 1))


def stored(scale: float) -> float:
    """A scale after a stay in float16, never 0."""
    return float(np.float16(max(scale, 2.0**-24)))
