"""Blocks of text as the tensors that a training step reads.

The logits at position t predict the token at t + 1. So position t is kept, and counts in every
loss and every mean, where that token is one to be predicted and belongs to the same document.

B is batch, T positions, N kept positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks


@dataclass(frozen=True)
class Batch:
    """Some blocks, ready for both models.

    Attributes:
        ids: Token ids, shape (B, T).
        positions: Position of each token in its own document, shape (B, T).
        kept: True where the position counts, shape (B, T); N of them.
        next_ids: The token after each kept position, in row-major order, shape (N,).
    """

    ids: Tensor
    positions: Tensor
    kept: Tensor
    next_ids: Tensor


def make_batch(blocks: TokenBlocks, device: torch.device) -> Batch:
    """Bring some blocks onto a device.

    Args:
        blocks: The blocks of the batch.
        device: Where to compute.

    Returns:
        The batch.
    """
    kept = blocks.kept
    next_ids = blocks.ids[:, 1:][kept[:, :-1]]
    arrays = (blocks.ids, blocks.position_ids, kept, next_ids)
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays))
