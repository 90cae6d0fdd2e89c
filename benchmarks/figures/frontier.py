"""The Pareto frontier of fidelity, speed and size.

A model is dominated if another is at least as close to the reference, at least as fast and at
least as small, and clearly better in one of the three. Differences within the noise count as none.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures.model_result import ModelResult

#: Speeds and sizes that differ by less than this share count as equal.
SAME_RATIO = 0.02
#: So do KL divergences that differ by less than this, in nats: float32 sums in another order differ
#: by as much.
SAME_NATS = 1e-4


def dominators(models: Sequence[ModelResult]) -> dict[str, tuple[str, ...]]:
    """The models that dominate each model.

    Args:
        models: Results on the same text and machine.

    Returns:
        Name of each model to the names of those that dominate it; empty on the frontier.
    """
    return {
        model.name: tuple(
            other.name for other in models if other is not model and _dominates(other, model)
        )
        for model in models
    }


def _dominates(one: ModelResult, other: ModelResult) -> bool:
    advantages = (
        _advantage(other.mean_kl, one.mean_kl, SAME_NATS),
        _advantage(
            one.latency.decode_tokens_per_second, other.latency.decode_tokens_per_second, 0.0
        ),
        _advantage(other.footprint.weight_bytes, one.footprint.weight_bytes, 0.0),
    )
    return min(advantages) >= 0 and max(advantages) > 0


def _advantage(larger: float, smaller: float, margin: float) -> int:
    """1 if the first is clearly larger, -1 if the second is, 0 if they differ too little."""
    difference = larger - smaller
    if abs(difference) <= max(margin, SAME_RATIO * max(abs(larger), abs(smaller))):
        return 0
    return 1 if difference > 0 else -1
