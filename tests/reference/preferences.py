"""Losses and log-probabilities of preferences, written out one answer at a time."""

from __future__ import annotations

import math
from typing import Any

import torch


def log_probability(model: Any, ids: tuple[int, ...], start: int) -> float:
    """log p of the tokens from ``start`` on, each after all that precede it."""
    total = 0.0
    for place in range(start, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:place]])).logits[0, -1].double()
        total += float(logits[ids[place]] - torch.logsumexp(logits, 0))
    return total


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair_loss(
    loss: str,
    chosen: float,
    rejected: float,
    lengths: tuple[int, int],
    beta: float,
    smoothing: float,
) -> float:
    """One pair's loss, from its two log ratios."""
    if loss == "sigmoid":
        return -math.log(sigmoid(beta * (chosen - rejected)))
    chosen_mean, rejected_mean = chosen / lengths[0], rejected / lengths[1]
    if loss == "sigmoid_norm":
        return -math.log(sigmoid(beta * (chosen_mean - rejected_mean)))
    if loss == "ipo":
        return (chosen_mean - rejected_mean - 1 / (2 * beta)) ** 2
    assert loss == "robust"
    right = -math.log(sigmoid(beta * (chosen - rejected)))
    wrong = -math.log(sigmoid(beta * (rejected - chosen)))
    return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)


def odds_loss(chosen: float, rejected: float, lengths: tuple[int, int], beta: float) -> float:
    """One pair's loss, from its two log-probabilities."""
    better, worse = math.exp(chosen / lengths[0]), math.exp(rejected / lengths[1])
    odds = better / (1 - better) / (worse / (1 - worse))
    return -math.log(better) - beta * math.log(sigmoid(math.log(odds)))
