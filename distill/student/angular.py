"""Which block of layers turns the hidden state least: angular distance.

Layers that stand side by side often do one job together, and a block whose output points where
its input pointed can go as a whole. The distance between the states before layer l and behind
the n layers from there on is

    d(x^l, x^(l+n)) = 1/pi arccos( x^l . x^(l+n) / (|x^l| |x^(l+n)|) )

and of all blocks of n layers the one with the least distance goes (Gromov et al., 2024, section
3.2, https://arxiv.org/abs/2403.17887). The paper takes the mean over the last position of
sequences that were cut from web pages. Conversations all end in the same token, so here it is
taken over positions spread evenly over the text.

L is layers, S sampled positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SAMPLED_POSITIONS = 512


def sampled_positions(present: Tensor, count: int = _SAMPLED_POSITIONS) -> Tensor:
    """Positions to compare states at, spread evenly over the text.

    Args:
        present: True where there is a token, shape (N, T).
        count: How many at most.

    Returns:
        Shape (N, T), True at the positions.
    """
    places = present.flatten().nonzero()[:, 0]
    steps = torch.linspace(0, len(places) - 1, min(count, len(places)), dtype=torch.float64)
    sampled = torch.zeros_like(present).flatten()
    sampled[places[steps.round().long().to(places.device)]] = True
    return sampled.reshape(present.shape)


def angular_distances(states: Sequence[Tensor]) -> Tensor:
    """How far apart the hidden states at every two depths point.

    Args:
        states: Hidden states at the same positions before each layer and behind the last, each
            of shape (S, D).

    Returns:
        Shape (L + 1, L + 1), float64, from 0 (same direction) to 1 (opposite).
    """
    directions = [torch.nn.functional.normalize(state.double(), dim=-1) for state in states]
    distances = torch.zeros((len(states), len(states)), dtype=torch.float64)
    for start, before in enumerate(directions):
        for end in range(start + 1, len(directions)):
            cosine = (before * directions[end]).sum(dim=-1).clamp(-1, 1)
            distances[start, end] = distances[end, start] = cosine.arccos().mean() / math.pi
    return distances


def least_turning_block(distances: Tensor, length: int) -> int:
    """The block of layers that can best go.

    Args:
        distances: From ``angular_distances``, shape (L + 1, L + 1).
        length: Layers in the block, 1 to L.

    Returns:
        Its first layer; of blocks that tie, the first one.
    """
    return int(distances.diagonal(length).argmin())
