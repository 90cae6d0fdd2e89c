"""Round weights to the nearest code: the baseline of GPTQ, which needs no calibration text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mistill.weights.gptq_layout import QuantizedWeight
from mistill.weights.grid import GridKind, best_grid
from quantize.gptq.gptq import group_columns
from quantize.settings import GridSettings

# Weights that are rounded at once.
_AT_ONCE = 1 << 22


def round_weight(W: Tensor, settings: GridSettings, candidates: int = 1) -> QuantizedWeight:
    """Round every weight to the nearest code of its group's grid.

    Args:
        W: Shape (N, K), any float type; a few rows at a time are turned into float32.
        settings: Bits, group size and the like; the group size divides K.
        candidates: Scales tried for each group, the one with the least squared error is kept; 1
            takes the scale that just covers the group.

    Returns:
        The codes.
    """
    outputs, columns = W.shape
    size = group_columns(columns, settings.group_size)
    groups = columns // size
    kind = GridKind(
        bits=settings.bits, symmetric=settings.symmetric, scale_type=settings.scale_type
    )
    scale_dtype = np.float16 if settings.scale_type == "float16" else np.float32
    codes = np.empty((outputs, columns), np.uint8)
    scales = np.empty((outputs, groups), scale_dtype)
    zeros = np.empty((outputs, groups), np.uint8)
    step = max(1, _AT_ONCE // columns)
    for start in range(0, outputs, step):
        part = W[start : start + step]
        # Every group of every row is a row of its own here: (g, n * G).
        weights = part.to(torch.promote_types(part.dtype, torch.float32)).reshape(-1, size).T
        grid = best_grid(weights, weights.new_ones(size), kind, candidates)
        rows = slice(start, start + len(part))
        codes[rows] = grid.encode(weights).T.reshape(len(part), columns).numpy()
        scales[rows] = grid.scales.reshape(len(part), groups).numpy()
        zeros[rows] = grid.zeros.reshape(len(part), groups).numpy()
    g_idx = (np.arange(columns) // size).astype(np.int32)
    return QuantizedWeight(
        codes, scales, zeros, g_idx, settings.bits, settings.group_size, settings.scale_type
    )
