"""What a step of training is, from its number alone: which blocks, how fast, and who wrote them.

Nothing here has a state, so that a run that resumes has nothing to rewind.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from distill.settings import TrainSettings
    from mistill.text.blocks import TokenBlocks


def step_count(blocks: TokenBlocks, settings: TrainSettings) -> int:
    """Optimizer steps that read about ``settings.tokens`` text tokens.

    Args:
        blocks: Blocks to learn from.
        settings: How to train.

    Returns:
        At least 1.
    """
    tokens_per_step = blocks.tokens / len(blocks) * settings.batch_size
    return max(1, round(settings.tokens / tokens_per_step))


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
    wanted = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(blocks, place // blocks, seed)[place % blocks]) for place in wanted]


@lru_cache(maxsize=4)
def _order(blocks: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def is_on_policy(step: int, share: float) -> bool:
    """Whether the student writes the text of a step.

    Args:
        step: Counted from 0.
        share: Of the steps in which it does, 0 to 1.

    Returns:
        True in ``floor(share * n)`` of the first n steps, whatever n is, evenly spread.
    """
    return math.floor((step + 1) * share) > math.floor(step * share)


def learning_rate_at(step: int, steps: int, settings: TrainSettings) -> float:
    """A straight rise over the warm-up, then half a cosine down to 0.

    Args:
        step: Counted from 0.
        steps: How many there will be.
        settings: How to train.

    Returns:
        The learning rate of this step.
    """
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
