"""Greedy removal of layers written out: every student run whole, one document at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def _log_probabilities(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def greedy_drops(
    model: Any, documents: Sequence[tuple[Sequence[int], Sequence[bool]]], count: int
) -> list[tuple[int, float]]:
    """Which layers go, in order, and the mean KL once each is gone.

    A document is its tokens, and for each whether it is to be predicted; the first never is.
    """
    layers = list(model.model.layers)
    teacher = [_log_probabilities(model, ids) for ids, _ in documents]

    def divergence(keep: Sequence[int]) -> float:
        model.model.layers = torch.nn.ModuleList([layers[layer] for layer in keep])
        model.config.num_hidden_layers = len(keep)
        terms = []
        for (ids, mask), log_p in zip(documents, teacher, strict=True):
            log_q = _log_probabilities(model, ids)
            for place in range(1, len(ids)):
                if mask[place]:
                    before = place - 1
                    p = log_p[before].exp()
                    terms.append(float((p * (log_p[before] - log_q[before])).sum()))
        return sum(terms) / len(terms)

    left = list(range(len(layers)))
    drops = []
    for _ in range(count):
        costs = {layer: divergence([other for other in left if other != layer]) for layer in left}
        best = min(costs, key=lambda layer: costs[layer])
        drops.append((best, costs[best]))
        left.remove(best)
    return drops
