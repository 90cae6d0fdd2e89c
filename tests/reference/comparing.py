"""Slow, obvious twins of what benchmarks compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def kl_by_definition(reference: Sequence[float], logits: Sequence[float]) -> float:
    """sum(p * ln(p / q)) for one position, one token at a time, in Python's own floats."""

    def probabilities(scores: Sequence[float]) -> list[float]:
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        return [weight / math.fsum(weights) for weight in weights]

    p, q = probabilities(reference), probabilities(logits)
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def bootstrap_standard_error(
    samples: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], float],
    draws: int = 4000,
    seed: int = 0,
) -> float:
    """Spread of a statistic over texts made of passages drawn again and again with replacement."""
    random = np.random.default_rng(seed)
    passages = [np.asarray(passage, float) for passage in samples]
    values = []
    for _ in range(draws):
        drawn = random.integers(len(passages), size=len(passages))
        values.append(statistic(np.concatenate([passages[number] for number in drawn])))
    return float(np.std(values, ddof=1))
