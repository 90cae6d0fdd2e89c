"""What a step of training is, from its number alone: which blocks it reads, and how fast it learns.

Nothing here has a state, so that a run that resumes has nothing to rewind.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mistill.text.blocks import TokenBlocks


def step_count(blocks: TokenBlocks, tokens: int, batch_size: int) -> int:
    """Optimizer steps that read about so many text tokens.

    Args:
        blocks: Blocks to learn from.
        tokens: Text tokens to train on, padding not counted.
        batch_size: Blocks of one step.

    Returns:
        At least 1.
    """
    tokens_per_step = blocks.tokens / len(blocks) * batch_size
    return max(1, round(tokens / tokens_per_step))


def blocks_of_step(step: int, blocks: int, batch_size: int, seed: int) -> list[int]:
    """Which blocks an optimizer step reads.

    Every epoch reads all blocks once, in an order of its own; a step may span two epochs.

    Args:
        step: Counted from 0.
        blocks: How many there are.
        batch_size: How many a step reads.
        seed: Decides the orders.

    Returns:
        ``batch_size`` indices.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(blocks, place // blocks, seed)[place % blocks]) for place in places]


@lru_cache(maxsize=4)
def _order(blocks: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def learning_rate_at(step: int, steps: int, *, peak: float, warmup: float) -> float:
    """The learning rate rises linearly during the warm-up, then falls along half a cosine.

    It is above 0 in every step: the cosine would reach 0 one step after the last.

    Args:
        step: Counted from 0.
        steps: How many there will be.
        peak: The highest learning rate, of the last step of the warm-up.
        warmup: Share of the steps in which the learning rate rises, 0 to 1.

    Returns:
        The learning rate of this step.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    share = (step - rising) / (steps - rising)
    return peak * 0.5 * (1 + math.cos(math.pi * share))
