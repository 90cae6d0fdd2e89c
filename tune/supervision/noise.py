"""Noise on embeddings during training (NEFTune, Jain et al., 2023, https://arxiv.org/abs/2310.05914).

To the embeddings of a text of L tokens and D numbers each is added a uniform noise from -1 to 1,
times alpha / sqrt(L D): its length is about alpha / sqrt(3) whatever the text's length. Documents
that share a block have each its own L. The noise follows from the seed, the step and the block
alone, so that it is the same on one process or several, and after a kill.

B is batch, T positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where some blocks stand in a run.

    Attributes:
        seed: Of the run.
        step: Optimizer step, from 0.
        first: Number, within the step, of the first of the blocks.
    """

    seed: int
    step: int
    first: int


def noise_for(positions: Tensor, width: int, alpha: float, place: Place) -> Tensor:
    """The noise of some blocks.

    Args:
        positions: Position of each token in its own document, shape (B, T).
        width: D.
        alpha: Strength, above 0.
        place: Where the blocks stand.

    Returns:
        Shape (B, T, D), float32, on the device of the positions.
    """
    rows = []
    for number, row in enumerate(positions.cpu()):
        seed = ((place.seed * 1_000_003 + place.step) * 1_000_003 + place.first + number) % 2**63
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand((len(row), width), generator=generator) * 2 - 1
        lengths = document_lengths(row)
        rows.append(uniform * (alpha / (lengths * width).sqrt())[:, None])
    return torch.stack(rows).to(positions.device)


def document_lengths(positions: Tensor) -> Tensor:
    """How long the document is in which each token stands.

    Args:
        positions: Of one block, shape (T,); 0 begins a document.

    Returns:
        Shape (T,), float32.
    """
    starts = torch.nonzero(positions == 0)[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([len(positions)]))
    return lengths.repeat_interleave(lengths).float()
