"""Blocks of text as the tensors that a training step reads, and what a model makes of them.

The logits at position t predict the token at t + 1. So position t is kept, and counts in every
loss and every mean, where that token is one to be predicted and belongs to the same document.

B is batch, T positions, N kept positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def last_hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Run a model's body, not its head, over packed blocks.

    Without an attention mask, transformers takes a position that does not follow its
    predecessor for the start of another document, and lets attention cross no such border.

    Args:
        model: A Llama or Mistral with its head.
        ids: Token ids, shape (B, T).
        positions: Position of each token in its own document, shape (B, T).

    Returns:
        Shape (B, T, D), after the last norm.
    """
    hidden: Tensor = model.get_decoder()(
        input_ids=ids, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden
