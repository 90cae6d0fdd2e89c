"""The sampler written out slowly: one rule after another, over every token of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def distribution(
    logits: Sequence[float],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float = 1.0,
    seen: Collection[int] = (),
) -> list[float]:
    """The probability of every token, by the definitions and in their order."""
    scores = list(logits)
    for token in set(seen):
        if scores[token] < 0:
            scores[token] *= repetition_penalty
        else:
            scores[token] /= repetition_penalty
    if temperature == 0:
        best = scores.index(max(scores))
        return [1.0 if token == best else 0.0 for token in range(len(scores))]
    scores = [score / temperature for score in scores]
    ranking = sorted(range(len(scores)), key=lambda token: -scores[token])
    kept = set(ranking)
    if top_k:
        last = scores[ranking[min(top_k, len(ranking)) - 1]]
        kept = {token for token in kept if scores[token] >= last}
    probabilities = normalised(scores, kept)
    nucleus: set[int] = set()
    for token in ranking:
        if token in kept and sum(probabilities[other] for other in nucleus) < top_p:
            nucleus.add(token)
    probabilities = normalised(scores, nucleus)
    most = max(probabilities)
    return normalised(scores, {t for t in nucleus if probabilities[t] >= min_p * most})


def normalised(scores: Sequence[float], kept: Collection[int]) -> list[float]:
    """Softmax over the tokens kept, zero elsewhere."""
    most = max(scores[token] for token in kept)
    odds = [math.exp(score - most) if token in kept else 0.0 for token, score in enumerate(scores)]
    total = sum(odds)
    return [value / total for value in odds]


def dry_penalties(
    written: list[int], multiplier: float, base: float, allowed: int
) -> dict[int, float]:
    """DRY by its definition: every earlier place, and how much of the text before it is the end."""
    penalties: dict[int, float] = {}
    for place in range(1, len(written)):
        length = 0
        while length < place and written[place - 1 - length] == written[-1 - length]:
            length += 1
        if length >= allowed:
            penalty = multiplier * base ** (length - allowed)
            penalties[written[place]] = max(penalty, penalties.get(written[place], 0.0))
    return penalties
